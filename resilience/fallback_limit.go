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

// shareLimits makes the limits of one instance's shares, and keeps them.
type shareLimits struct {
	least bool                              // shares are at least one token
	zero  func(whole *quota.Limit, n int64) // is called once for each name of a limit whose share is 0, under the lock

	mu   sync.RWMutex
	made map[shareLimitKey]shareLimit
	told map[unique.Handle[string]]struct{} // names of limits of which zero was called

	// good holds limits that have a share, by their hash: a call of a healthy primary looks only here.
	good [64]atomic.Pointer[quota.Limit]
}

// maxShareLimits bounds the limits kept. Programs have a few; one that makes up limits all the time must not
// fill the memory.
const maxShareLimits = 4096

type shareLimitKey struct {
	name unique.Handle[string]
	spec quota.Spec
	n    int64
}

type shareLimit struct {
	limit *quota.Limit
	err   error
}

// of returns the limit of the share of one of n instances.
func (s *shareLimits) of(l *quota.Limit, n int64) (*quota.Limit, error) {
	if err := l.Err(); err != nil {
		return nil, err
	}
	k := shareLimitKey{l.Handle(), *l.Spec(), n}
	s.mu.RLock()
	share, ok := s.made[k]
	s.mu.RUnlock()
	if ok {
		return share.limit, share.err
	}
	share.limit, share.err = newShareLimit(l, n, s.least)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.made == nil || len(s.made) >= maxShareLimits {
		s.made = make(map[shareLimitKey]shareLimit)
	}
	s.made[k] = share
	if share.err == nil && share.limit.Spec().Capacity == 0 && l.Spec().Capacity > 0 {
		s.tell(l, n)
	}
	return share.limit, share.err
}

// tell calls zero, unless it was called for the limit's name. The caller holds the lock.
func (s *shareLimits) tell(l *quota.Limit, n int64) {
	if _, told := s.told[l.Handle()]; told || len(s.told) >= maxShareLimits {
		return
	}
	if s.told == nil {
		s.told = make(map[unique.Handle[string]]struct{})
	}
	s.told[l.Handle()] = struct{}{}
	s.zero(l, n)
}

// newShareLimit returns the limit of the share of one of n instances; least says that it is at least one token.
func newShareLimit(l *quota.Limit, n int64, least bool) (*quota.Limit, error) {
	sharer, ok := l.Algorithm().(driver.Sharer)
	if !ok {
		return nil, invalid(fmt.Sprintf("the algorithm %s of limit %s is not a driver.Sharer, so a fallback has no share of it", l.Spec().Rule, l.Name()),
			"an algorithm with a method Share, as those of package algorithm have, or FailOpen or FailClosed in the fallback's place")
	}
	a, err := sharer.Share(n)
	if err != nil {
		return nil, fmt.Errorf("resilience: limit %s has no share for one of %d instances: %w", l.Name(), n, err)
	}
	if least && a.Spec().Capacity == 0 && l.Spec().Capacity > 0 {
		one, ok := sharer.(driver.OneSharer)
		if !ok {
			return nil, invalid(fmt.Sprintf("the algorithm %s of limit %s is not a driver.OneSharer, so %d instances have no share of one token", l.Spec().Rule, l.Name(), n),
				"an algorithm with a method ShareAtLeastOne, a capacity of one token an instance, or FallbackOptions without AtLeastOne")
		}
		if a, err = one.ShareAtLeastOne(n); err != nil {
			return nil, fmt.Errorf("resilience: limit %s has no share of one token for one of %d instances: %w", l.Name(), n, err)
		}
	}
	share := quota.NewLimit(l.Name(), a)
	return share, share.Err()
}

// sharable fails if a limit has no share, so that the program learns it before an outage.
func (f *fallback) sharable(l *quota.Limit) error {
	good := &f.limits.good[l.Hash()%uint64(len(f.limits.good))]
	if good.Load() == l {
		return nil
	}
	if _, err := f.limits.of(l, f.lastCount.Load()); err != nil {
		return err
	}
	good.Store(l)
	return nil
}

// usedAfter returns how much of a limit is used some time after a number of tokens was, by the limit's own
// rule. It counts all of them as used at the last moment, so its result is never too low.
func usedAfter(l *quota.Limit, used int64, at quota.Micros, passed time.Duration) int64 {
	if used <= 0 {
		return 0
	}
	a := l.Algorithm()
	s, _ := a.Decide(quota.State{}, quota.Request{Op: quota.OpDebit, Cost: used}, at)
	_, v := a.Decide(s, quota.Request{Op: quota.OpPeek}, at+quota.Micros(max(passed, 0)/time.Microsecond))
	return l.Spec().Capacity - v.Remaining
}
