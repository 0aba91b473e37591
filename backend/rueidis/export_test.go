package rueidis

import "github.com/fleetquota/fleetquota/backend/internal/engine"

// Engine returns the engine under a store.
func (s *Store) Engine() *engine.Store { return s.engine }
