package faulttest

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// place is where a test runs: a server, or a cluster.
type place struct {
	direct  target
	proxies *redisserver.Proxies // before its servers
	servers []*redisserver.Server
}

func (p place) through() target { return p.direct.through(p.proxies) }

func eachPlace(t *testing.T, f func(t *testing.T, p place)) {
	t.Run("single", func(t *testing.T) {
		t.Parallel()
		s := redisserver.Start(t)
		f(t, place{single(s), redisserver.StartProxies(t, s.Addr()), []*redisserver.Server{s}})
	})
	t.Run("cluster", func(t *testing.T) {
		t.Parallel()
		c := redisserver.StartCluster(t)
		f(t, place{clustered(c), redisserver.StartProxies(t, c.Addrs()...), servers(c)})
	})
}

// drops is a fault that loses replies to scripts which ran: 1 % of them, or 4 % of a reduced run.
func drops(seed uint64) redisserver.Fault {
	return redisserver.Fault{
		Action: redisserver.DropReply, Match: redisserver.Commands("EVALSHA", "EVAL"),
		Probability: 0.01 * float64(sized(4, 1)), Seed: seed,
	}
}

// TestAtMostOnce loses replies after the server executed: no call may charge twice, and each that may have
// charged must say so.
func TestAtMostOnce(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		eachPlace(t, func(t *testing.T, p place) {
			s := l.open(t, p.through())
			limit, list, n := yearly(plenty), keys(16), sized(2000, 10_000)
			calls(s, limit, list, len(list)) // connected, and the script known, before anything is lost
			lost := p.proxies.Inject(drops(seed(t)))
			before, had := runs(t, p.servers...), charged(t, l.open(t, p.direct), limit, list...)
			before += int64(len(list)) // the peeks
			y := calls(s, limit, list, n)
			p.proxies.Clear()
			ran := runs(t, p.servers...) - before
			t.Logf("%d calls, %d replies lost, %d scripts ran: %v", n, lost.Fired(), ran, y)
			y.only(t, quota.ErrIndeterminate)
			y.bounds(t, charged(t, l.open(t, p.direct), limit, list...)-had)
			if lost.Fired() == 0 || y.errors() == 0 {
				t.Error("nothing was lost")
			}
			if ran > int64(n) {
				t.Errorf("%d calls ran %d scripts", n, ran)
			}
		})
	})
}

// TestExactlyOnce repeats calls with a request id until they succeed, whatever was lost on the way.
func TestExactlyOnce(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		eachPlace(t, func(t *testing.T, p place) {
			s := l.open(t, p.through())
			limit, list, n := yearly(plenty), keys(16), sized(600, 10_000)
			calls(s, limit, list, len(list))
			lost := p.proxies.Inject(drops(seed(t)))
			var y tally
			var wg sync.WaitGroup
			const workers = 16
			for w := range workers {
				wg.Go(func() {
					for i := w; i < n; i += workers {
						c := quota.Charge{Limit: limit, Key: list[i%len(list)], Cost: 1, ID: fmt.Sprint("request-", i)}
						for range 100 {
							if y.do(bg, s, c) == nil {
								break
							}
							time.Sleep(time.Millisecond)
						}
					}
				})
			}
			wg.Wait()
			t.Logf("%d ids, %d replies lost: %v", n, lost.Fired(), &y)
			y.only(t, quota.ErrIndeterminate)
			if got := charged(t, l.open(t, p.direct), limit, list...) - int64(len(list)); got != int64(n) || y.ok != int64(n) {
				t.Errorf("%d ids were charged %d times and granted %d times", n, got, y.ok)
			}
			if lost.Fired() == 0 {
				t.Error("nothing was lost")
			}
		})
	})
}
