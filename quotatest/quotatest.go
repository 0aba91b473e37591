// Package quotatest is for the tests of programs that use quotas: a store in memory with a clock that the test moves,
// failures that it causes, and calls that it looks at.
//
//	func TestWorker(t *testing.T) {
//		store := quotatest.New(t, nil)
//		limiter := quota.Must(quota.NewLimiter(store, perAgent, nil))
//
//		work(limiter) // takes 1000 tokens
//		store.WantCharged(perAgent, "agent-1", 1000)
//		store.Advance(time.Minute)
//		store.Fail(quota.ErrUnavailable) // an outage
//		work(limiter)
//	}
//
// The clock stands still between calls of [Store.Advance], so a test gives the same result each time, and takes no time:
// a [quota.Limiter.Wait] sleeps until the clock was moved as far as it must wait. A context's deadline, and the timeouts and
// breakers of package resilience, go by the process's own clock.
//
// It works the same inside a bubble of testing/synctest. There Options.Clock may be time.Now: then the store's time is the
// bubble's, which time.Sleep moves, and Advance moves it further.
package quotatest

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Start is the time at which the clock of a store stands at first, unless Options.Clock says otherwise: a midnight in UTC.
var Start = time.Date(2026, time.January, 1, 0, 0, 0, 0, time.UTC)

// Options configure a Store. The zero value, and nil, take the defaults.
type Options struct {
	// Clock tells the time, to which the calls of Advance are added; nil stands still at Start. In a bubble of
	// testing/synctest it may be time.Now. It may be called concurrently, and must not call the store.
	Clock func() time.Time
}

// Store is a [quota.Store] in memory for tests. It decides as the store of package local does. Use New to make one. Methods
// may be called concurrently.
type Store struct {
	t     testing.TB
	store *local.Store
	clock func() time.Time // nil stands still

	mu       sync.Mutex
	advanced time.Duration
	sleepers []*sleeper
	changed  chan struct{} // closed when the number of sleepers changes
	err      error         // of every call
	next     []fault       // of the next calls
	hung     chan struct{} // calls wait until it is closed, unless nil
	calls    []quota.Call
	charged  map[owner]int64
}

// owner is a limit and key.
type owner struct{ limit, key string }

// sleeper is a caller that waits for a time.
type sleeper struct {
	at    time.Time
	due   chan time.Time
	timer *time.Timer // where the clock runs by itself
}

var (
	_ quota.Store    = (*Store)(nil)
	_ driver.Prompt  = (*Store)(nil)
	_ driver.Wrapper = (*Store)(nil)
	_ driver.Clocked = (*Store)(nil)
	_ driver.Lister  = (*Store)(nil)
)

// New returns an empty store. It is closed when the test ends.
func New(t testing.TB, o *Options) *Store {
	if o == nil {
		o = &Options{}
	}
	s := &Store{t: t, clock: o.Clock, changed: make(chan struct{}), charged: map[owner]int64{}}
	s.store = quota.Must(local.NewWithOptions(local.Options{Clock: s.Now}))
	t.Cleanup(func() { s.Close() })
	return s
}

// Now returns the store's time, at which it decides.
func (s *Store) Now() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now()
}

func (s *Store) now() time.Time {
	if s.clock == nil {
		return Start.Add(s.advanced)
	}
	return s.clock().Add(s.advanced)
}

// Advance moves the store's clock, and wakes the callers whose time to wait is over. A negative span sets it back.
func (s *Store) Advance(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.advanced += d
	s.wake()
}

// wake wakes the sleepers whose time has come.
func (s *Store) wake() {
	now := s.now()
	s.sleepers = slices.DeleteFunc(s.sleepers, func(p *sleeper) bool {
		if p.at.After(now) {
			return false
		}
		p.stop()
		close(p.due)
		return true
	})
	s.noteSleepers()
}

func (p *sleeper) stop() {
	if p.timer != nil {
		p.timer.Stop()
	}
}

// noteSleepers tells AwaitSleepers of a change.
func (s *Store) noteSleepers() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// After returns a channel that is closed once the store's clock is d after from. A [quota.Limiter] calls it for its waiting
// callers.
func (s *Store) After(from time.Time, d time.Duration) (due <-chan time.Time, stop func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := &sleeper{at: from.Add(d), due: make(chan time.Time)}
	if s.clock != nil {
		p.timer = time.AfterFunc(p.at.Sub(s.now()), func() { s.Advance(0) })
	}
	s.sleepers = append(s.sleepers, p)
	s.wake()
	return p.due, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if i := slices.Index(s.sleepers, p); i >= 0 {
			p.stop()
			s.sleepers = slices.Delete(s.sleepers, i, i+1)
			s.noteSleepers()
		}
	}
}

// Sleepers returns how many callers sleep until the clock moves.
func (s *Store) Sleepers() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.sleepers)
}

// AwaitSleepers returns when at least n callers sleep until the clock moves: of the callers of Wait and WaitAll of one limiter
// and key that is the first, for the others wait for it. It ends the test with t.Fatal after ten seconds.
func (s *Store) AwaitSleepers(n int) {
	s.t.Helper()
	timeout := time.NewTimer(10 * time.Second)
	defer timeout.Stop()
	for {
		s.mu.Lock()
		have, changed := len(s.sleepers), s.changed
		s.mu.Unlock()
		if have >= n {
			return
		}
		select {
		case <-changed:
		case <-timeout.C:
			s.t.Fatalf("quotatest: callers that sleep until the clock moves: got %d, want %d", have, n)
		}
	}
}

// Fail has every call from now on fail with the error, and charge nothing; nil ends it. A listing of keys fails and
// hangs as a call does, but it is none of Calls, and LoseNext leaves it alone. backend.List lists, and then asks for the states.
func (s *Store) Fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

// FailNext has the next n calls fail with the error, and charge nothing.
func (s *Store) FailNext(n int, err error) { s.fault(n, fault{err: err}) }

// LoseNext has the next n calls be decided, and charged where they are granted, and their answers be lost: the caller gets
// [quota.ErrIndeterminate].
func (s *Store) LoseNext(n int) {
	s.fault(n, fault{err: fmt.Errorf("quotatest: %w: the answer is lost", quota.ErrIndeterminate), decided: true})
}

// fault is the fault of one call.
type fault struct {
	err     error
	decided bool // the store decides the call all the same
}

func (s *Store) fault(n int, f fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next = append(s.next, slices.Repeat([]fault{f}, n)...)
}

// Hang has calls from now on wait until resume is called, as those to a server that hangs. A call whose context ends before
// that was not charged, and fails with [quota.ErrIndeterminate] and the context's error, for its caller cannot know; a listing
// charges nothing, and fails with [quota.ErrUnavailable].
func (s *Store) Hang() (resume func()) {
	hung := make(chan struct{})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hung = hung
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.hung == hung {
			s.hung = nil
		}
		close(hung)
	})
}

// Charge decides one charge.
func (s *Store) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	var out [1]quota.Decision
	err := s.decide(ctx, []quota.Charge{c}, out[:], func() (err error) {
		out[0], err = s.store.Charge(ctx, c)
		return err
	})
	if err != nil {
		return quota.Decision{}, err
	}
	return out[0], nil
}

// ChargeAll decides a list of charges.
func (s *Store) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	return s.decide(ctx, cs, out, func() error { return s.store.ChargeAll(ctx, cs, out) })
}

// decide has the store inside decide, unless the test has the call fail, and notes the call.
func (s *Store) decide(ctx context.Context, cs []quota.Charge, out []quota.Decision, do func() error) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	f := s.meet(ctx, quota.ErrIndeterminate, func(fault) bool { return true })
	made := false
	if f.err == nil || f.decided {
		if err = do(); err == nil {
			made, err = quota.Granted(out), f.err
		}
	} else {
		err = f.err
	}
	s.note(cs, out, made, err)
	return err
}

// meet returns the fault of a call: the one that the test caused, or the first of the next ones that are for such a call. unsure is the
// error of a call whose context ends while the store hangs.
func (s *Store) meet(ctx context.Context, unsure error, of func(fault) bool) fault {
	s.mu.Lock()
	hung, f := s.hung, fault{err: s.err}
	if n := slices.IndexFunc(s.next, of); f.err == nil && n >= 0 {
		f = s.next[n]
		s.next = slices.Delete(s.next, n, n+1)
	}
	s.mu.Unlock()
	if hung != nil {
		select {
		case <-hung:
		case <-ctx.Done():
			return fault{err: fmt.Errorf("quotatest: %w: the store hangs: %w", unsure, ctx.Err())}
		}
	}
	return f
}

// List lists keys as the store of package local does, unless the test has the call fail.
func (s *Store) List(ctx context.Context, l driver.Listing) (driver.Page, error) {
	if err := ctx.Err(); err != nil {
		return driver.Page{}, err
	}
	if f := s.meet(ctx, quota.ErrUnavailable, func(f fault) bool { return !f.decided }); f.err != nil {
		return driver.Page{}, f.err
	}
	return s.store.List(ctx, l)
}

// note notes a call.
func (s *Store) note(cs []quota.Charge, out []quota.Decision, made bool, err error) {
	call := quota.Call{Charges: cs, Err: err}
	if err == nil {
		call.Decisions, call.Granted, call.Decider = out, made, quota.Decider(out)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, *call.Clone())
	for i := range cs {
		if made && !out[i].Replayed {
			s.charged[owner{cs[i].Limit.Name(), cs[i].Key}] += out[i].Charged
		}
	}
}

// Calls returns the calls that reached the store so far, in the order in which they ended: those of Wait and WaitAll one by
// one, also those that only ask, and those that failed. The times of the calls, and Refused, are not set.
func (s *Store) Calls() []quota.Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

// Charged returns the tokens that were charged to a limit and key in all, less those that were given back. It fails the test if the
// limit is not valid: no call can charge such a limit.
func (s *Store) Charged(limit *quota.Limit, key string) int64 {
	s.t.Helper()
	if err := limit.Err(); err != nil {
		s.t.Errorf("tokens that were charged to %q: %v", key, err)
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.charged[owner{limit.Name(), key}]
}

// WantCharged fails the test unless Charged is n, and shows the calls that charged the limit and key.
func (s *Store) WantCharged(limit *quota.Limit, key string, n int64) {
	s.t.Helper()
	got := s.Charged(limit, key)
	if got == n || limit.Err() != nil {
		return
	}
	var calls strings.Builder
	for _, call := range s.Calls() {
		for i, c := range call.Charges {
			if c.Limit.Name() != limit.Name() || c.Key != key {
				continue
			}
			fmt.Fprintf(&calls, "\n\t%v: ", c)
			switch {
			case call.Err != nil:
				calls.WriteString(call.Err.Error())
			case !call.Granted:
				fmt.Fprintf(&calls, "not made: %v", call.Decisions[i])
			default:
				calls.WriteString(call.Decisions[i].String())
			}
		}
	}
	if calls.Len() == 0 {
		calls.WriteString(" none")
	}
	s.t.Errorf("charged to %q of limit %q: got %d, want %d; its calls:%s", key, limit.Name(), got, n, &calls)
}

// Forget forgets the calls and sums so far, and no quota.
func (s *Store) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = nil
	clear(s.charged)
}

// Prompt returns true: every call returns by its context's deadline, also while the store hangs.
func (s *Store) Prompt() bool { return true }

// Unwrap returns the store inside, of package local.
func (s *Store) Unwrap() quota.Store { return s.store }

// Close ends the store: later calls are quota.ErrClosed.
func (s *Store) Close() error { return s.store.Close() }
