package local

// slab allocates values by number. A value never moves while it is in use. Of several copies of a slab only
// one may be used.
type slab[T any] struct {
	pages []*[pageSize]T
	used  int      // numbers ever allocated
	free  []uint32 // numbers given back
}

const pageSize = 16

func (s *slab[T]) at(n uint32) *T { return &s.pages[n/pageSize][n%pageSize] }

// take allocates a value, which is zero or as it was when it was given back.
func (s *slab[T]) take() uint32 {
	if last := len(s.free) - 1; last >= 0 {
		n := s.free[last]
		s.free = s.free[:last]
		return n
	}
	if s.used == len(s.pages)*pageSize {
		s.pages = append(s.pages, new([pageSize]T))
	}
	s.used++
	return uint32(s.used - 1)
}

func (s *slab[T]) give(n uint32) { s.free = append(s.free, n) }
