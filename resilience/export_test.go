package resilience

import (
	"context"
	"time"

	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/sony/gobreaker/v2"

	"github.com/fleetquota/fleetquota/quota"
)

// StateOf returns the state of the breaker of a store: "closed", "open", or "half-open" from when a probe may be made.
func StateOf(s quota.Store) string {
	if b, ok := find[*breaker](s); ok {
		switch state := b.circuit.Load().State(); {
		case b.until.Load() > b.now():
			return "open"
		case state == gobreaker.StateOpen:
			return "half-open"
		default:
			return state.String()
		}
	}
	b, _ := find[*failsafeBreaker](s)
	if b.cb.State() == circuitbreaker.OpenState && b.cb.RemainingDelay() == 0 {
		return "half-open"
	}
	return b.cb.State().String()
}

// Remembered returns how many denials a memory holds.
func Remembered(s quota.Store) (n int) {
	m, _ := find[*memory](s)
	for i := range m.shards {
		n += len(m.shards[i].denials)
	}
	return n
}

// Calls returns how many calls that a timeout handed over have not ended.
func Calls(s quota.Store) int {
	h, _ := find[*handOff](s)
	return len(h.slots)
}

func NewDeadline(parent context.Context, at time.Time) *deadline {
	return &deadline{Context: parent, at: at}
}

// Release ends the context.
func (d *deadline) Release() { d.release() }
