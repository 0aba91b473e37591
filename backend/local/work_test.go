package local

import (
	"fmt"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// progress is how far the work on a shard has come that is beside the decisions.
type progress struct {
	index *uint64
	hand  int
	old   *older
	place int
}

// work returns the places of indexes that were looked at or left since the last call, over all shards. It looks at all
// shards after each of many calls, on the caller's goroutine: the race detector would take most of the test's time.
//
//go:norace
func (s *Store) work(last *[shardCount]progress) (places int) {
	for i := range s.shards {
		sh, was := &s.shards[i], &last[i]
		is := progress{old: sh.old, hand: sh.hand}
		if len(sh.index) > 0 {
			is.index = &sh.index[0]
		}
		if sh.old != nil {
			is.place = sh.old.place
		}
		if is == *was {
			continue
		}
		if moved := is.index != was.index && is.index != nil && was.index != nil; moved && (is.old == nil || was.index != &is.old.index[0]) {
			places += len(sh.index) // at once
		}
		if was.old != nil && was.old != is.old {
			places += len(was.old.index) - was.place
		}
		if is.old != nil && is.old == was.old {
			places += is.place - was.place
		}
		if is.index == was.index {
			if places += is.hand - was.hand; is.hand < was.hand {
				places += len(sh.index)
			}
		}
		*was = is
	}
	return places
}

// A call does a bounded amount of work beside its decision, however many keys there are: while the table grows, is swept
// and shrinks. Only a refused call looks further, and that is bounded too.
func TestOneCallDoesBoundedWork(t *testing.T) {
	keys := sized(12_000, 1_000_000)
	s, c := withClock(keys)
	l := bucket("n", 10, time.Hour)
	var last [shardCount]progress
	most := map[string]int{}
	do := func(phase string, calls int, key func(i int) string) {
		t.Helper()
		total := 0
		for i := range calls {
			before := s.Len()
			if _, err := s.Charge(bg, quota.Charge{Limit: l, Key: key(i), Cost: 1}); err != nil && phase != "refuse" {
				t.Fatalf("call %d of %s: got %v, want nil", i, phase, err)
			}
			bound, removals := 128, 24
			if before == keys { // no room: it has to be reclaimed
				bound, removals = 3*4*(4096+512)+128, 3*512+24
			}
			places := s.work(&last)
			total += places
			most[phase] = max(most[phase], places)
			if places > bound || before-s.Len() > removals {
				t.Fatalf("call %d of %s, at %d keys: got %d places looked at, %d keys removed; want %d and %d at most", i, phase, before, places, before-s.Len(), bound, removals)
			}
		}
		if total == 0 && phase != "refuse" && phase != "hold" { // then no key can be whole
			t.Errorf("%s: got no work, want some", phase)
		}
	}
	do("grow", keys, func(i int) string { return fmt.Sprint("a", i) })
	do("refuse", 1000, func(i int) string { return fmt.Sprint("b", i) })
	do("hold", keys/4, func(i int) string { return fmt.Sprint("a", i) })
	c.add(2 * time.Hour)
	do("reclaim", keys, func(i int) string { return fmt.Sprint("c", i) })
	c.add(2 * time.Hour)
	do("shrink", 20*keys, func(i int) string { return fmt.Sprint("d", i%100) })
	if s.Len() > keys/4 {
		t.Errorf("keys left: got %d, want %d at most", s.Len(), keys/4)
	}
	t.Logf("most places in a call: %v", most)
	s.checkAll(t)
}
