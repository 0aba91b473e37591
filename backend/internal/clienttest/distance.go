package clienttest

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// noise is the time that a loaded machine may add to a first decision.
const noise = 150 * time.Millisecond

// distance has servers 1 to 120 ms away, through the usual policies: the first decision comes within ten round trips of
// the first call, or of the moment when the server is back; of the calls after it less than one in a hundred fails; and
// no breaker is open at the end. A decision takes one round trip, and connecting some, which are no part of a decision:
// else a timeout of fewer round trips than connecting takes would never be met.
func distance(t *testing.T, l library) {
	for _, row := range []struct {
		fault   string
		timeout time.Duration // 0 is the policies' own
		reduced []time.Duration
		whole   []time.Duration
	}{
		{"cold", 0, nil, trips(1, 20, 60, 120)},
		{"cold", 100 * time.Millisecond, nil, trips(1, 20)},
		{"restart", 0, trips(60), trips(1, 20, 60, 120)},
		{"restart", 100 * time.Millisecond, nil, trips(1, 20)},
		{"failover", 0, nil, trips(1, 20, 60, 120)},
		{"failover", 100 * time.Millisecond, nil, trips(1, 20)},
		{"TLS", 0, trips(120), trips(1, 20, 60, 120)},
		{"TLS", 100 * time.Millisecond, nil, trips(1, 20)},
	} {
		list := row.reduced
		if testenv.Full() {
			list = row.whole
		}
		for _, trip := range list {
			t.Run(fmt.Sprintf("%s/%v/%v", row.fault, trip, row.timeout), func(t *testing.T) {
				const tries = 3 // a loaded machine stalls by itself for longer than the shortest timeout
				for try := 1; ; try++ {
					wrong := atDistance(t, l, row.fault, trip, row.timeout)
					if len(wrong) == 0 {
						return
					}
					if try == tries {
						t.Errorf("in each of %d tries, last: %s", tries, strings.Join(wrong, "; "))
						return
					}
				}
			})
		}
	}
}

func trips(ms ...int) (list []time.Duration) {
	for _, n := range ms {
		list = append(list, time.Duration(n)*time.Millisecond)
	}
	return list
}

// atDistance returns the promises that were not kept.
func atDistance(t *testing.T, l library, fault string, trip, timeout time.Duration) (wrong []string) {
	var inner quota.Store
	list := keys(8)
	var hit func() time.Time // makes the fault, and returns when the servers were well again
	switch fault {
	case "cold", "restart":
		server := redisserver.Start(t)
		inner = l.open(t, "redis://"+redisserver.StartDistance(t, trip, server.Addr()).Addr(server.Addr()))
		if fault == "restart" {
			hit = func() time.Time {
				ok(t, server.Restart())
				return time.Now()
			}
		}
	case "TLS":
		server := tlsServer(t)
		inner = l.open(t, "rediss://"+redisserver.StartDistance(t, trip, server.Addr()).Addr(server.Addr())+"?"+ca(server))
	case "failover":
		c := redisserver.StartCluster(t)
		to := clustered(c)
		to.dialer = redisserver.StartDistance(t, trip, c.Addrs()...).DialContext
		inner = l.dial(t, to)
		node, err := c.MasterFor(stateOf(list[0]))
		ok(t, err)
		list = list[:1]
		hit = func() time.Time {
			_, err := c.Failover(node)
			ok(t, err)
			return time.Now()
		}
	}
	s, err := resilience.Standard(inner, resilience.FailWithError(), &resilience.StandardOptions{Timeout: timeout})
	ok(t, err)
	defer s.Close()

	run := &distant{s: s}
	most := 10*trip + noise
	start := time.Now()
	stop := run.calls(list)
	run.decided(start)
	if hit != nil {
		time.Sleep(500 * time.Millisecond)
		run.forget()
		start = hit()
		run.decided(start)
		// A call may fail just before the server is back: the pause after a failed attempt at connecting.
		most += 250 * time.Millisecond
	}
	first := run.since(start)
	time.Sleep(time.Duration(sized(1000, 3000)) * time.Millisecond)
	stop()
	t.Logf("first decision after %v; then %d calls, of which %d failed: %v", first.Round(time.Millisecond), run.made, run.failed, run.texts)
	if first > most {
		wrong = append(wrong, fmt.Sprintf("first decision: got %v, want at most %v", first, most))
	}
	if run.failed*100 >= run.made {
		wrong = append(wrong, fmt.Sprintf("failed calls after the first decision: got %d of %d, want less than one in a hundred: %v", run.failed, run.made, run.texts))
	}
	for node, state := range resilience.BreakerStates(s) {
		if state != "closed" {
			wrong = append(wrong, fmt.Sprintf("breaker of node %q: got %s, want closed", node, state))
		}
	}
	return wrong
}

// distant counts the calls that begin after the first decision.
type distant struct {
	s quota.Store

	mu           sync.Mutex
	first        time.Time // when the first decision came
	began        time.Time // calls that began earlier do not count
	made, failed int
	texts        map[string]int
}

// calls makes calls from eight goroutines until stop.
func (r *distant) calls(list []string) (stop func()) {
	done := make(chan struct{})
	limit := counted(plenty)
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				start := time.Now()
				_, err := r.s.Charge(bg, quota.Charge{Limit: limit, Key: list[i%len(list)], Cost: 1})
				r.count(start, err)
				time.Sleep(2 * time.Millisecond)
			}
		})
	}
	return sync.OnceFunc(func() { close(done); all.Wait() })
}

func (r *distant) count(start time.Time, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.first.IsZero() {
		if err == nil && !start.Before(r.began) {
			r.first = time.Now()
		}
		return
	}
	if start.Before(r.first) {
		return
	}
	r.made++
	if err != nil {
		r.failed++
		if r.texts == nil {
			r.texts = map[string]int{}
		}
		r.texts[err.Error()]++
	}
}

// forget has the count begin anew, with calls that begin from now on.
func (r *distant) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.first, r.began, r.made, r.failed, r.texts = time.Time{}, time.Now(), 0, 0, nil
}

// decided waits for a decision that comes after a time, for some seconds.
func (r *distant) decided(after time.Time) {
	const most = 5 * time.Second
	for time.Since(after) < most && !r.isDecided(after) {
		time.Sleep(time.Millisecond)
	}
}

func (r *distant) isDecided(after time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.first.IsZero() && r.first.Before(after) { // of the server before its fault
		r.first, r.began, r.made, r.failed, r.texts = time.Time{}, after, 0, 0, nil
	}
	return !r.first.IsZero()
}

func (r *distant) since(start time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.first.IsZero() {
		return time.Since(start)
	}
	return r.first.Sub(start)
}
