package resilience

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"
	"unique"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// shares makes the limits that an instance decides by on its own, and keeps them.
type shares struct {
	mu   sync.RWMutex
	held map[shareKey]shareOf

	// good has limits whose shares were made, by their hash: what the path of a healthy primary looks at.
	good [64]atomic.Pointer[quota.Limit]
}

// maxShares bounds the shares kept. Programs have a few limits; one that makes up limits all the time
// must not fill the memory.
const maxShares = 4096

type shareKey struct {
	name unique.Handle[string]
	spec quota.Spec
	n    int64
}

type shareOf struct {
	limit *quota.Limit
	err   error
}

// of returns the limit for one of n instances.
func (s *shares) of(l *quota.Limit, n int64) (*quota.Limit, error) {
	k := shareKey{l.Handle(), *l.Spec(), n}
	s.mu.RLock()
	held, ok := s.held[k]
	s.mu.RUnlock()
	if ok {
		return held.limit, held.err
	}
	held.limit, held.err = makeShare(l, n)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held == nil || len(s.held) >= maxShares {
		s.held = make(map[shareKey]shareOf)
	}
	s.held[k] = held
	return held.limit, held.err
}

func makeShare(l *quota.Limit, n int64) (*quota.Limit, error) {
	sharer, ok := l.Algorithm().(driver.Sharer)
	if !ok {
		return nil, invalid(fmt.Sprintf("the algorithm %s of limit %s is not a driver.Sharer, so a fallback has no share of it", l.Spec().Rule, l.Name()),
			"an algorithm with a method Share, as those of package algorithm have, or FailOpen or FailClosed in the fallback's place")
	}
	a, err := sharer.Share(n)
	if err != nil {
		return nil, fmt.Errorf("resilience: limit %s has no share for one of %d instances: %w", l.Name(), n, err)
	}
	return quota.NewLimit(l.Name(), a)
}

// sharable fails if a limit has no share, so that this is known before it is needed.
func (f *fallback) sharable(l *quota.Limit) error {
	good := &f.shares.good[l.Hash()%uint64(len(f.shares.good))]
	if good.Load() == l {
		return nil
	}
	if _, err := f.shares.of(l, f.lastCount.Load()); err != nil {
		return err
	}
	good.Store(l)
	return nil
}

// usedAfter returns what is used of a limit some time after a number of tokens was: the rule says it. It
// counts all of them as used at the last moment, so never too little.
func usedAfter(l *quota.Limit, used int64, at quota.Micros, passed time.Duration) int64 {
	if used <= 0 {
		return 0
	}
	a := l.Algorithm()
	s, _ := a.Decide(quota.State{}, quota.Request{Op: quota.OpDebit, Cost: used}, at)
	_, v := a.Decide(s, quota.Request{Op: quota.OpPeek}, at+quota.Micros(max(passed, 0)/time.Microsecond))
	return l.Spec().Capacity - v.Remaining
}
