package clienttest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// slots returns a limit of ten at once, whose holds lapse after a time.
func slots(ttl time.Duration) *quota.Limit {
	return quota.NewLimit("slots", algorithm.Concurrency(10, ttl))
}

// unclosed is a store that outlives its limiter.
type unclosed struct{ quota.Store }

func (u unclosed) Unwrap() quota.Store { return u.Store }
func (unclosed) Close() error          { return nil }

// process returns a limiter as a process of a fleet has it; Close of it is the process's end.
func process(t testing.TB, s quota.Store, limit *quota.Limit) *quota.Limiter {
	t.Helper()
	lim, err := quota.NewLimiter(unclosed{s}, limit, &quota.Options{Notice: func(quota.Notice) {}})
	ok(t, err)
	t.Cleanup(func() { lim.Close() })
	return lim
}

// free returns how many slots are free.
func free(t testing.TB, lim *quota.Limiter) int64 {
	t.Helper()
	d, err := lim.Peek(bg, "k", 0)
	ok(t, err)
	return d.Remaining
}

// holderVariable makes a process of the test's binary hold slots until it is killed.
const holderVariable = "CLIENTTEST_HOLDER"

// holderKilled has another process hold slots: for ten ttl it keeps them, and when it is killed they come back within a ttl and
// a sixteenth of it.
func holderKilled(t *testing.T, l library) {
	const ttl = 800 * time.Millisecond
	if addr := os.Getenv(holderVariable); addr != "" {
		lim := process(t, l.dial(t, target{addrs: []string{addr}}), slots(ttl))
		r, err := lim.Reserve(bg, quota.Charge{Key: "k", Cost: 7})
		ok(t, err)
		fmt.Println("holds:", r.Granted)
		<-r.Lost()
		fmt.Println("lost")
		return
	}
	t.Parallel()
	server := redisserver.Start(t)
	cmd := exec.Command(os.Args[0], "-test.run=^"+strings.ReplaceAll(t.Name(), "/", "$/^")+"$", "-test.v")
	cmd.Env = append(os.Environ(), holderVariable+"="+server.Addr())
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	ok(t, err)
	ok(t, cmd.Start())
	killed := false
	defer func() {
		if !killed {
			cmd.Process.Kill()
		}
		cmd.Wait()
	}()
	said := make(chan string)
	go func() {
		defer close(said)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if line := lines.Text(); strings.HasPrefix(line, "holds") || strings.HasPrefix(line, "lost") {
				said <- line
			}
		}
	}()
	select {
	case line := <-said:
		if line != "holds: true" {
			t.Fatalf("the holder says %q, want that it holds", line)
		}
	case <-time.After(patience):
		t.Fatal("the holder does not hold")
	}
	lim := process(t, l.dial(t, single(server)), slots(ttl))
	for start := time.Now(); time.Since(start) < 10*ttl; time.Sleep(ttl / 20) {
		if got := free(t, lim); got != 3 {
			t.Fatalf("slots that are free %v after another process took 7: got %d, want 3", time.Since(start), got)
		}
	}
	killed = true
	ok(t, cmd.Process.Kill()) // SIGKILL
	cmd.Wait()
	since := time.Now()
	for line := range said {
		t.Errorf("the holder said %q, want nothing until it was killed", line)
	}
	took := until(t, "the slots of a dead process", func() bool { return free(t, lim) == 10 })
	if most := ttl + ttl/16 + 100*time.Millisecond; took > most {
		t.Errorf("slots of a dead process came back after %v (%v after its end), want %v at most", took, time.Since(since), most)
	}
}

// holdsFrozen stops the server for half of a ttl, again and again: no reservation is lost.
func holdsFrozen(t *testing.T, l library) {
	t.Parallel()
	const ttl = 4 * time.Second
	server := redisserver.Start(t)
	to := single(server)
	to.timeout = 300 * time.Millisecond // calls to the stopped server fail, and are repeated
	lim := process(t, l.dial(t, to), slots(ttl))
	watch := process(t, l.dial(t, single(server)), slots(ttl))
	r, err := lim.Reserve(bg, quota.Charge{Key: "k", Cost: 4})
	ok(t, err)
	for range sized(2, 10) {
		time.Sleep(ttl / 4)
		ok(t, server.Pause())
		time.Sleep(ttl / 2)
		ok(t, server.Resume())
		time.Sleep(ttl / 4)
		until(t, "the server", func() bool { _, err := watch.Peek(bg, "k", 0); return err == nil })
		if got := free(t, watch); got != 6 {
			t.Fatalf("free slots after the server stood still: got %d, want 6", got)
		}
	}
	select {
	case <-r.Lost():
		t.Error("lost: got true, want false")
	default:
	}
	ok(t, r.Release(bg))
	if got := free(t, watch); got != 10 {
		t.Errorf("free slots at the end: got %d, want 10", got)
	}
}

// holdsOnce finishes reservations while replies are lost: each is charged once, and no other hold is touched.
func holdsOnce(t *testing.T, l library) {
	t.Parallel()
	eachSite(t, func(t *testing.T, p site) {
		const ttl = time.Minute
		limit := quota.NewLimit("tokens", algorithm.Held(algorithm.FixedWindow(plenty, year), ttl))
		lim := process(t, l.dial(t, p.through()), limit)
		direct := process(t, l.dial(t, p.direct), limit)
		free(t, lim)
		var want int64
		var mu sync.Mutex
		lost := p.proxies.Inject(drops(seed(t)))
		stranger, err := direct.Reserve(bg, quota.Charge{Key: "k", Cost: 1000})
		ok(t, err)
		var wg sync.WaitGroup
		for w := range 8 {
			wg.Go(func() {
				for i := range sized(20, 200) {
					r, err := lim.Reserve(bg, quota.Charge{Key: "k", Cost: 10, ID: fmt.Sprint("job-", w, "-", i)})
					for ; err != nil; r, err = lim.Reserve(bg, quota.Charge{Key: "k", Cost: 10, ID: fmt.Sprint("job-", w, "-", i)}) {
						if !errors.Is(err, quota.ErrIndeterminate) {
							t.Errorf("reserve: %v", err)
							return
						}
					}
					used := int64(i % 20)
					mu.Lock()
					want += used
					mu.Unlock()
					for err := r.Settle(bg, used); err != nil; err = r.Settle(bg, used) {
						if !errors.Is(err, quota.ErrIndeterminate) {
							t.Errorf("settle: %v", err)
							return
						}
						time.Sleep(time.Millisecond)
					}
				}
			})
		}
		wg.Wait()
		if got := plenty - free(t, direct) - 1000; got != want {
			t.Errorf("tokens charged, with %d lost replies: got %d, want %d", lost.Fired(), got, want)
		}
		if lost.Fired() == 0 {
			t.Error("lost replies: got none, want some")
		}
		ok(t, stranger.Release(bg))
		if got := plenty - free(t, direct); got != want {
			t.Errorf("tokens charged at the end: got %d, want %d", got, want)
		}
	})
}

// holdsFleet has processes take slots while replies are lost, and end at random with slots held: never more than ten are had
// at once, and all come back.
func holdsFleet(t *testing.T, l library) {
	t.Parallel()
	const ttl = time.Second
	server := redisserver.Start(t)
	proxies := redisserver.StartProxies(t, server.Addr())
	proxies.Inject(drops(seed(t)))
	var mu sync.Mutex
	open, most := 0, 0
	had := func(n int) {
		mu.Lock()
		defer mu.Unlock()
		open += n
		most = max(most, open)
	}
	random := rand.New(rand.NewPCG(seed(t), 1))
	span := func(d time.Duration) time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return time.Duration(random.Int64N(int64(d)))
	}
	conn := l.dial(t, single(server).through(proxies))
	var fleet sync.WaitGroup
	for range 5 {
		fleet.Go(func() {
			for range sized(3, 20) {
				lim, err := quota.NewLimiter(unclosed{conn}, slots(ttl), &quota.Options{Notice: func(quota.Notice) {}})
				if err != nil {
					t.Error(err)
					return
				}
				life, end := context.WithTimeout(bg, span(3*ttl))
				var work sync.WaitGroup
				for range 3 {
					work.Go(func() {
						for life.Err() == nil {
							r, err := lim.Acquire(life, "k", 2)
							if err != nil {
								continue // lost replies, or the end
							}
							had(2)
							select {
							case <-time.After(span(2 * ttl)):
							case <-r.Lost():
							case <-life.Done():
							}
							had(-2)
							if life.Err() == nil {
								_ = r.Release(bg) // repeated, where a reply was lost
							}
						}
					})
				}
				work.Wait()
				end()
				lim.Close()
			}
		})
	}
	fleet.Wait()
	proxies.Clear()
	if most > 10 {
		t.Errorf("slots that were had at once: got %d, want 10 at most", most)
	}
	t.Logf("%d slots at once", most)
	lim := process(t, l.dial(t, single(server)), slots(ttl)) // a connection through the proxy may still break
	took := until(t, "all slots", func() bool { return free(t, lim) == 10 })
	if took > ttl+ttl/16+100*time.Millisecond {
		t.Errorf("all slots came back after %v, want %v at most", took, ttl+ttl/16)
	}
}

// holdRecords: the record of a finish lives until IDWindow after the lapse of its hold.
func holdRecords(t *testing.T, l library) {
	const ttl = time.Minute
	server, open := l.single(t)
	lim := process(t, open(engine.Options{}), slots(ttl))
	r, err := lim.Reserve(bg, quota.Charge{Key: "k", Cost: 1, ID: "job"})
	ok(t, err)
	ok(t, r.Release(bg))
	for key, want := range map[string]time.Duration{"job": quota.IDWindow, "reserve/job/0": quota.IDWindow + ttl} {
		name := string(driver.AppendIDKey([]byte("quota:"), "k", key))
		if got := server.PTTL(bg, name).Val(); got < want-10*time.Second || got > want+ttl/16+2*time.Millisecond {
			t.Errorf("lifetime of the record of %s: got %v, want about %v", key, got, want)
		}
	}
}
