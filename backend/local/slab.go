package local

// slab hands out numbered places that never move while in use. It may be copied as long as one copy is used.
type slab[T any] struct {
	pages []*[pageSize]T
	used  int      // places ever handed out
	free  []uint32 // those given back
}

const pageSize = 16

func (s *slab[T]) at(n uint32) *T { return &s.pages[n/pageSize][n%pageSize] }

// take hands out a place, zero or as it was given back.
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
