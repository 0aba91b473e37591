package local

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// faulty is an algorithm that ends charges of some cost otherwise than by a verdict.
type faulty struct{ quota.Algorithm }

const (
	panics = 666
	exits  = 667
)

func (f faulty) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	switch r.Cost {
	case panics:
		panic("a fault in an algorithm")
	case exits:
		runtime.Goexit() // as a test does that fails
	}
	return f.Algorithm.Decide(s, r, now)
}

// A panic of an algorithm or of the clock, under a shard's lock, reaches the caller that caused it. It leaves no lock held, no
// room taken and nothing written: the other calls go on, those on the same key too.
func TestPanicsLeaveNoLock(t *testing.T) {
	for _, why := range []string{"algorithm", "exit", "clock"} {
		for _, id := range []string{"", "id"} {
			for _, length := range []int{1, 3} {
				t.Run(fmt.Sprintf("%s/%d%s", why, length, id), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { // which ends if a call waits for a lock without end
						c, broken := newClock(), false
						s := quota.Must(NewWithOptions(Options{MaxKeys: 1000, Clock: func() time.Time {
							if broken {
								panic("a fault in a clock")
							}
							return c.time()
						}}))
						good := bucket("n", 10, time.Hour)
						bad := quota.NewLimit("n", faulty{good.Algorithm()})
						cs := make([]quota.Charge, length)
						for i := range cs {
							cs[i] = quota.Charge{Limit: good, Key: fmt.Sprint("g/k", i), Cost: 1, ID: id}
						}
						last := &cs[length-1]
						switch why {
						case "algorithm":
							last.Limit, last.Cost = bad, panics
						case "exit":
							last.Limit, last.Cost = bad, exits
						case "clock":
							broken = true
						}
						ended := make(chan any, 1)
						go func() {
							returned := false
							defer func() {
								r := recover()
								if !returned && r == nil {
									r = "Goexit"
								}
								ended <- r
							}()
							if length == 1 {
								s.Charge(bg, cs[0])
							} else {
								s.ChargeAll(bg, cs, make([]quota.Decision, length))
							}
							returned = true
						}()
						if got := <-ended; got == nil {
							t.Error("the call returned; want its panic to reach the caller")
						} else if why == "algorithm" || why == "clock" {
							if !strings.Contains(fmt.Sprint(got), "a fault in") {
								t.Errorf("panic: got %v, want the one of the %s", got, why)
							}
						}
						broken = false
						for i := range s.shards {
							if !s.shards[i].mu.TryLock() {
								t.Fatalf("shard %d is locked after the panic", i)
							}
							s.shards[i].mu.Unlock()
						}
						if s.Len() != 0 || s.ids.used.Load() != 0 {
							t.Errorf("after the panic: got %d keys, %d ids; want none", s.Len(), s.ids.used.Load())
						}
						last.Limit, last.Cost = good, 1
						out := make([]quota.Decision, length)
						if err := s.ChargeAll(bg, cs, out); err != nil || !quota.Granted(out) || out[length-1].Remaining != 9 || out[0].Replayed {
							t.Errorf("the same call without the fault: got %+v, %v; want it granted, 9 remaining", out, err)
						}
						s.checkAll(t)
					})
				})
			}
		}
	}
}
