package resilience_test

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/failsafe-go/failsafe-go/bulkhead"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// TestBulkhead holds both bulkheads: n in flight, the next refused at once, and no slot lost by a panic.
func TestBulkhead(t *testing.T) {
	for name, p := range map[string]resilience.Policy{
		"own":      resilience.Bulkhead(3),
		"failsafe": resilience.Failsafe(bulkhead.New[result](3), nil),
	} {
		t.Run(name, func(t *testing.T) {
			both(t, func(t *testing.T, take func(quota.Store, context.Context, quota.Charge) (quota.Decision, error)) {
				in, out := make(chan struct{}), make(chan struct{})
				store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) {
					in <- struct{}{}
					<-out
					return granted, nil
				}}
				s := wrap(t, store, p)
				var wg sync.WaitGroup
				for range 3 {
					wg.Go(func() {
						if d, err := take(s, bg, charge(1)); err != nil || d != granted {
							t.Errorf("a call that fits: got %+v, %v; want %+v", d, err, granted)
						}
					})
					<-in
				}
				for range 10 {
					_, err := take(s, bg, charge(1))
					wantErr(t, err, quota.ErrOverloaded, resilience.ErrRejected)
				}
				close(out)
				wg.Wait()
				for _, fail := range []func(){func() { panic("test") }, func() { runtime.Goexit() }} {
					for range 5 {
						store.answer = func(context.Context, quota.Charge) (quota.Decision, error) { fail(); return granted, nil }
						done := make(chan struct{})
						go func() {
							defer close(done)
							defer func() { recover() }()
							take(s, bg, charge(1))
							t.Error("the call returned, want its panic or Goexit")
						}()
						<-done
					}
					if name == "failsafe" {
						break // after Goexit its permit is lost, as documented
					}
				}
				store.answer = nil
				if _, err := take(s, bg, charge(1)); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestBulkheadStorm: what is refused never takes the place of what fits. Each refusal has a call beside it
// that was let through.
func TestBulkheadStorm(t *testing.T) {
	type call struct {
		from, to int64
		refused  bool
	}
	s := wrap(t, &stub{}, resilience.Bulkhead(1))
	var clock atomic.Int64
	calls := make([][]call, 16)
	var wg sync.WaitGroup
	for i := range calls {
		wg.Go(func() {
			for range sized(4000, 100_000) {
				c := call{from: clock.Add(1)}
				_, err := s.Charge(bg, charge(1))
				c.to, c.refused = clock.Add(1), err != nil
				calls[i] = append(calls[i], c)
			}
		})
	}
	wg.Wait()
	all := slices.Concat(calls...)
	// beside[n] counts the calls let through that were under way at the time n.
	beside := make([]int, clock.Load()+2)
	refused := 0
	for _, c := range all {
		if !c.refused {
			beside[c.from]++
			beside[c.to]--
		}
	}
	sum := make([]int, len(beside)) // times up to n at which somebody was let through
	under := 0
	for n := range beside {
		under += beside[n]
		if n > 0 {
			sum[n] = sum[n-1]
		}
		if under > 0 {
			sum[n]++
		}
	}
	for _, c := range all {
		if c.refused {
			if refused++; sum[c.to]-sum[c.from-1] == 0 {
				t.Fatalf("a call from %d to %d was refused, and no other was in flight; want a slot for it", c.from, c.to)
			}
		}
	}
	t.Logf("%d of %d calls refused", refused, len(all))
}
