package clienttest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// drops is a fault that loses replies to scripts which ran: one of a hundred, or of 25 in a reduced run.
func drops(seed uint64) redisserver.Fault {
	return redisserver.Fault{
		Action: redisserver.DropReply, Match: redisserver.Commands("EVALSHA", "EVAL"),
		Every: sized(25, 100), Seed: seed,
	}
}

// atMostOnce loses replies after the server executed: no call may charge twice, and each that may have
// charged must say so.
func atMostOnce(t *testing.T, l library) {
	t.Parallel()
	eachSite(t, func(t *testing.T, p site) {
		s := l.dial(t, p.through())
		limit, list, n := counted(plenty), keys(16), sized(2000, 10_000)
		calls(s, limit, list, len(list)) // connected, and the script known, before anything is lost
		lost := p.proxies.Inject(drops(seed(t)))
		had := charged(t, l.dial(t, p.direct), limit, list...)
		before := runs(t, p.servers...)
		y := calls(s, limit, list, n)
		p.proxies.Clear()
		ran := runs(t, p.servers...) - before
		t.Logf("%d calls, %d replies lost, %d scripts ran: %v", n, lost.Fired(), ran, y)
		y.only(t, quota.ErrIndeterminate)
		y.bounds(t, charged(t, l.dial(t, p.direct), limit, list...)-had)
		if lost.Fired() == 0 || y.errors() == 0 {
			t.Errorf("lost replies: got %d, of which %d were errors; want some", lost.Fired(), y.errors())
		}
		if ran > int64(n) {
			t.Errorf("scripts run: got %d, want at most one for each of %d calls", ran, n)
		}
	})
}

// exactlyOnce repeats calls with a request id until they succeed, whatever was lost on the way.
func exactlyOnce(t *testing.T, l library) {
	t.Parallel()
	eachSite(t, func(t *testing.T, p site) {
		s := l.dial(t, p.through())
		limit, list, n := counted(plenty), keys(16), sized(600, 10_000)
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
		if got := charged(t, l.dial(t, p.direct), limit, list...) - int64(len(list)); got != int64(n) || y.ok != int64(n) {
			t.Errorf("ids: got %d charges and %d grants, want %d of both", got, y.ok, n)
		}
		if lost.Fired() == 0 {
			t.Error("lost replies: got none, want some")
		}
	})
}

const linearCapacity = 25

// seen is a caller's knowledge of a call.
type seen struct {
	unknown   bool
	allowed   bool
	remaining int64
}

// counter is a key with a limit: a call whose outcome is unknown was made or not.
var counter = (&porcupine.NondeterministicModel{
	Init: func() []any { return []any{int64(0)} },
	Step: func(state, in, out any) []any {
		used, c, o := state.(int64), in.(quota.Charge), out.(seen)
		fits, next := used+c.Cost <= linearCapacity, used
		if fits && c.Op == quota.OpTake {
			next += c.Cost
		}
		switch {
		case o.unknown && next != used:
			return []any{used, next}
		case o.unknown || o.allowed == fits && o.remaining == linearCapacity-next:
			return []any{next}
		}
		return nil
	},
	DescribeOperation: func(in, out any) string {
		return fmt.Sprintf("%v %d: %+v", in.(quota.Charge).Op, in.(quota.Charge).Cost, out)
	},
}).ToModel()

// linearizable races callers for one key while replies are lost: some order of the calls, in which each of
// unknown outcome was made or was not, explains all answers. C4 of package conformance asks the same without
// faults.
func linearizable(t *testing.T, l library) {
	t.Parallel()
	server := redisserver.Start(t)
	proxies := redisserver.StartProxies(t, server.Addr())
	s := l.dial(t, single(server).through(proxies))
	limit := counted(linearCapacity)
	random := rand.New(rand.NewPCG(seed(t), 0))
	calls(s, counted(plenty), keys(1), 1)
	lost := proxies.Inject(redisserver.Fault{Action: redisserver.DropReply, Match: redisserver.Commands("EVALSHA"), Every: 7, Seed: random.Uint64()})
	var unknown atomic.Int64
	for round := range sized(30, 1000) {
		const clients, each = 6, 8
		key := fmt.Sprint("linear-", round)
		history := make([][]porcupine.Operation, clients)
		start := time.Now()
		var wg sync.WaitGroup
		for client := range clients {
			r := rand.New(rand.NewPCG(random.Uint64(), 0))
			wg.Go(func() {
				for range each {
					c := quota.Charge{Limit: limit, Key: key, Cost: 1 + r.Int64N(3)}
					if r.IntN(4) == 0 {
						c.Op = quota.OpPeek
					}
					op := porcupine.Operation{ClientId: client, Input: c, Call: int64(time.Since(start))}
					d, err := s.Charge(bg, c)
					op.Return = int64(time.Since(start))
					if err != nil {
						if class(err) != quota.ErrIndeterminate {
							t.Error(err)
						}
						unknown.Add(1)
						op.Return = int64(time.Hour) // it may still be on its way
					}
					op.Output = seen{err != nil, d.Allowed, d.Remaining}
					history[client] = append(history[client], op)
				}
			})
		}
		wg.Wait()
		var all []porcupine.Operation
		for _, h := range history {
			all = append(all, h...)
		}
		switch porcupine.CheckOperationsTimeout(counter, all, 10*time.Second) {
		case porcupine.Illegal:
			for _, op := range all {
				t.Logf("%d-%d %s", op.Call, op.Return, counter.DescribeOperation(op.Input, op.Output))
			}
			t.Fatal("no order of these calls explains their answers")
		case porcupine.Unknown:
			t.Log("a history took too long to check")
		}
	}
	t.Logf("%d replies lost, %d outcomes unknown", lost.Fired(), unknown.Load())
	if unknown.Load() == 0 {
		t.Error("unknown outcomes: got none, want some")
	}
}

// paused freezes the server under calls with a deadline. They return, say that their outcome is unknown, and
// the server executes them when it wakes: a late charge counts against the caller and never for it.
func paused(t *testing.T, l library) {
	t.Parallel()
	const callers, deadline = 64, 100 * time.Millisecond
	server := redisserver.Start(t)
	to := single(server)
	to.timeout = 10 * time.Second // more than the deadline that must bound the calls
	s, direct := l.dial(t, to), l.dial(t, single(server))
	limit, list := counted(plenty), keys(8)
	y := calls(s, limit, list, 500)
	before := runtime.NumGoroutine()
	ok(t, server.Pause())
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for range 2 {
				ctx, cancel := context.WithTimeout(bg, deadline)
				y.do(ctx, s, quota.Charge{Limit: limit, Key: list[i%len(list)], Cost: 1})
				cancel()
			}
		})
	}
	wg.Wait()
	ok(t, server.Resume())
	// Wakened, the server reads the calls that were left behind; then the count stands still.
	now := charged(t, direct, limit, list...)
	until(t, "the late charges", func() bool {
		last := now
		time.Sleep(50 * time.Millisecond)
		now = charged(t, direct, limit, list...)
		return now == last
	})
	t.Logf("%d charged late: %v", now-y.ok, y)
	y.only(t, quota.ErrIndeterminate, quota.ErrOverloaded, quota.ErrUnavailable, errOdd)
	for _, err := range y.examples {
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got error %v, want one of a class, or the context's own", err)
		}
	}
	y.bounds(t, now)
	if y.failed[quota.ErrIndeterminate] == 0 {
		t.Errorf("unknown outcomes: got none in %v, want some", y)
	}
	if y.slowest > 5*time.Second {
		t.Errorf("slowest call: got %v, want about the deadline, %v", y.slowest, deadline)
	}
	until(t, "the goroutines of abandoned calls to end", func() bool { return runtime.NumGoroutine() <= before+callers/4 })
	z := calls(s, limit, list, 100)
	if z.ok < 50 {
		t.Errorf("after the pause: got %v, want 50 grants or more of 100", z)
	}
}

// contexts: a call or a look at the health whose context is done sends no script, and a deadline that passes
// in flight makes the outcome unknown. S4 and S6 of package conformance ask the rest.
func contexts(t *testing.T, l library) {
	t.Parallel()
	server := redisserver.Start(t)
	proxies := redisserver.StartProxies(t, server.Addr())
	s := l.dial(t, single(server).through(proxies))
	c := quota.Charge{Limit: counted(plenty), Key: "k", Cost: 1}
	take(t, s, c)
	before := runs(t, server)
	late, cancel := context.WithDeadline(bg, time.Now().Add(-time.Second))
	defer cancel()
	_, one := s.Charge(late, c)
	_, health := s.Health(late)
	for _, err := range []error{one, health} {
		if err != late.Err() {
			t.Errorf("a context that is done: got error %v, want %v", err, late.Err())
		}
	}
	if n := runs(t, server); n != before {
		t.Errorf("scripts sent with a context that is done: got %d, want none", n-before)
	}
	proxies.Inject(redisserver.Fault{Action: redisserver.DelayReply, Match: redisserver.Commands("EVALSHA"), Delay: 300 * time.Millisecond})
	ctx, cancel := context.WithTimeout(bg, 50*time.Millisecond)
	defer cancel()
	if _, err := s.Charge(ctx, c); class(err) != quota.ErrIndeterminate || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a deadline that passes in flight: got error %v, want ErrIndeterminate of DeadlineExceeded", err)
	}
	proxies.Clear()
	until(t, "the late charge", func() bool { return charged(t, s, c.Limit, "k") == 2 })
}

// poolExhausted lets callers wait for the only connection longer than the client has patience. They go alone,
// for together they may all go at once.
func poolExhausted(t *testing.T, l library) {
	if !l.pooled {
		return
	}
	t.Parallel()
	server := redisserver.Start(t)
	proxies := redisserver.StartProxies(t, server.Addr())
	to := single(server).through(proxies)
	to.pool, to.timeout, to.options.Batching = 1, 500*time.Millisecond, engine.BatchNone
	s := l.dial(t, to)
	limit := counted(plenty)
	until(t, "the connection", func() bool { return !s.fails(quota.Charge{Limit: limit, Key: keys(1)[0], Op: quota.OpPeek}) })
	proxies.Inject(redisserver.Fault{Action: redisserver.DelayReply, Match: redisserver.Commands("EVALSHA"), Delay: 300 * time.Millisecond})
	y := calls(s, limit, keys(1), 16)
	t.Log(y)
	y.only(t, quota.ErrOverloaded, quota.ErrIndeterminate)
	if y.failed[quota.ErrOverloaded] == 0 {
		t.Errorf("calls that found the pool exhausted: got none in %v, want some", y)
	}
	proxies.Clear()
	y.bounds(t, charged(t, s, limit, keys(1)...))
}

// closing closes a store over a client that is the caller's, and a client under a store. S8 of package
// conformance asks the rest.
func closing(t *testing.T, l library) {
	t.Parallel()
	server := redisserver.Start(t)
	s := l.dial(t, single(server))
	c := quota.Charge{Limit: counted(plenty), Key: "k", Cost: 1}
	take(t, s, c)
	before := runs(t, server)
	ok(t, s.Close())
	_, one := s.Charge(bg, c)
	_, health := s.Health(bg)
	is(t, "Charge after Close", one, quota.ErrClosed)
	is(t, "Health after Close", health, quota.ErrClosed)
	if n := runs(t, server); n != before {
		t.Errorf("scripts sent by a closed store: got %d, want none", n-before)
	}
	if err := s.ping(); err != nil {
		t.Errorf("the caller's client after Store.Close: got error %v, want none", err)
	}
	t.Run("client", func(t *testing.T) {
		eachSite(t, func(t *testing.T, p site) {
			s := l.dial(t, p.direct)
			take(t, s, c)
			for _, server := range p.servers {
				ok(t, server.Pause())
			}
			sent := make(chan error)
			go func() {
				_, err := s.Charge(bg, c)
				sent <- err
			}()
			time.Sleep(50 * time.Millisecond)
			s.close()
			if err := <-sent; !errors.Is(err, quota.ErrIndeterminate) {
				t.Errorf("a call that was sent before its client was closed: got error %v, want ErrIndeterminate", err)
			}
			for _, server := range p.servers {
				ok(t, server.Resume())
			}
			// rueidis may have sent the first calls: their errors cannot tell. It closes a cluster's connections by and by.
			until(t, "the client to be known as closed", func() bool {
				_, err := s.Charge(bg, c)
				if !errors.Is(err, quota.ErrClosed) && !errors.Is(err, quota.ErrIndeterminate) {
					t.Errorf("the client was closed by its owner: got error %v, want ErrClosed or ErrIndeterminate", err)
				}
				return class(err) == quota.ErrClosed
			})
			_, err := s.Charge(bg, c)
			is(t, "a client that is known to be closed", err, quota.ErrClosed)
		})
	})
	t.Run("unsent", func(t *testing.T) {
		eachSite(t, func(t *testing.T, p site) {
			s := l.dial(t, p.direct)
			others, err := s.open(engine.Options{})
			ok(t, err)
			defer others.Close()
			fresh, err := s.open(engine.Options{Prefix: "fresh:"}) // has sent nothing
			ok(t, err)
			defer fresh.Close()
			take(t, s, c)
			take(t, others, c)
			s.close()
			// rueidis closes a cluster's connections by and by: a call may still be answered.
			first := error(nil)
			until(t, "the client to be closed", func() bool {
				_, first = s.Charge(bg, c)
				return first != nil
			})
			is(t, "the first call that failed", first, quota.ErrClosed)
			_, err = s.Charge(bg, c)
			is(t, "the next call", err, quota.ErrClosed)
			is(t, "the first list of another store", others.ChargeAll(bg, []quota.Charge{c, c}, make([]quota.Decision, 2)), quota.ErrClosed)
			_, err = fresh.Charge(bg, c)
			is(t, "the first call of a store", err, quota.ErrClosed)
			_, err = s.Health(bg)
			is(t, "Health", err, quota.ErrClosed)
			if l.engine != nil {
				_, errs := engine.Together(bg, l.engine(s.store), [][]quota.Charge{{c}, {c}, {c, c}})
				for _, err := range errs {
					is(t, "a batch", err, quota.ErrClosed)
				}
			}
		})
	})
}

// hooks puts code into the caller's client that panics now and then. That costs the calls that it concerns a decision,
// and no other call.
func hooks(t *testing.T, l library) {
	t.Parallel()
	eachSite(t, func(t *testing.T, p site) {
		var scripts atomic.Int64
		var bug atomic.Bool
		to := p.direct
		to.hook = func() {
			if bug.Load() && scripts.Add(1)%20 == 0 {
				panic("a bug in a hook")
			}
		}
		s := l.dial(t, to)
		limit, list := counted(plenty), keys(16)
		granted := calls(s, limit, list, len(list)).ok
		bug.Store(true)
		y := calls(s, limit, list, sized(2000, 10_000))
		bug.Store(false)
		t.Log(y)
		y.only(t, errUncertain)
		for text := range y.texts {
			if !strings.Contains(text, "a bug in a hook") {
				t.Errorf("got error %q, want one that tells the panic", text)
			}
		}
		if y.errors() == 0 {
			t.Error("errors: got none, want some")
		}
		after := calls(s, limit, list, 10*len(list))
		if err := after.failure(); err != nil {
			t.Error("calls after the last panic: ", err)
		}
		after.ok += y.ok + granted
		after.exact(t, charged(t, s, limit, list...)) // no script was sent after a panic
	})
}

// idle breaks connections while no call uses them. A store that reads its connections all the time makes them anew by
// itself, so that the next call needs no time for a handshake.
func idle(t *testing.T, l library) {
	if l.pooled { // looks at a connection when a call takes it
		return
	}
	t.Parallel()
	limit, list := counted(plenty), keys(8)
	t.Run("single", func(t *testing.T) {
		t.Parallel()
		proxy := redisserver.StartProxy(t, redisserver.Start(t).Addr())
		s := l.open(t, "redis://"+proxy.Addr()+"?dial_timeout=10s")
		const handshake = 800 * time.Millisecond
		for range 2 {
			calls(s, limit, list, 64).only(t)
			slow := proxy.Inject(redisserver.Fault{Action: redisserver.DelayReply, Match: redisserver.Commands("HELLO"), Delay: handshake})
			proxy.Reset()
			until(t, "the store to connect anew", func() bool { return slow.Fired() > 0 })
			time.Sleep(2 * handshake)
			for range 64 {
				ctx, cancel := context.WithTimeout(bg, handshake/2)
				// A call that was sent may time out on a busy machine.
				if _, err := s.Charge(ctx, quota.Charge{Limit: limit, Key: list[0], Cost: 1}); err != nil && class(err) != quota.ErrIndeterminate {
					t.Errorf("a caller with less time than a handshake takes: got error %v, want none, or one of a call that was sent", err)
				}
				cancel()
			}
			proxy.Clear()
		}
	})
	t.Run("cluster", func(t *testing.T) {
		t.Parallel()
		c := redisserver.StartCluster(t)
		s := l.open(t, patiently(clusterURL(c, "")))
		calls(s, limit, list, 64).only(t)
		n, err := c.MasterFor(stateOf(list[0]))
		ok(t, err)
		gets := func() int { // which connect, and no decision has any
			stats, err := n.Server.Info("commandstats")
			ok(t, err)
			return number(stats["cmdstat_get"], "calls=")
		}
		before := gets()
		do(t, n.Server, "CLIENT", "KILL", "TYPE", "normal")
		until(t, "the store to connect anew", func() bool { return gets() > before })
		calls(s, limit, list, 64).only(t)
	})
}

// hasty has connections break while nobody looks, and then one caller without patience begin to connect, slowly. The
// callers who come meanwhile must not get that caller's end.
func hasty(t *testing.T, l library) {
	t.Parallel()
	for _, kind := range []string{"client", "URL"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			server := redisserver.Start(t)
			proxy := redisserver.StartProxy(t, server.Addr())
			var s quota.Store
			if kind == "URL" {
				s = l.open(t, patiently("redis://"+proxy.Addr()))
			} else {
				s = l.dial(t, target{addrs: []string{proxy.Addr()}})
			}
			limit, list := counted(plenty), keys(8)
			for range 4 {
				calls(s, limit, list, 64).only(t)
				slow := proxy.Inject(redisserver.Fault{Action: redisserver.DelayReply, Match: redisserver.Commands("HELLO"), Delay: 100 * time.Millisecond})
				time.Sleep(200 * time.Millisecond) // no handshake of the last round is under way
				proxy.Reset()
				time.Sleep(200 * time.Millisecond) // the client notices, also on a busy machine: else it would write to a connection that is gone
				var wg sync.WaitGroup
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(bg, 20*time.Millisecond)
					defer cancel()
					s.Charge(ctx, quota.Charge{Limit: limit, Key: "hasty", Cost: 1})
				})
				time.Sleep(5 * time.Millisecond)
				for _, key := range list {
					wg.Go(func() {
						ctx, cancel := context.WithTimeout(bg, patience)
						defer cancel()
						if _, err := s.Charge(ctx, quota.Charge{Limit: limit, Key: key, Cost: 1}); err != nil {
							t.Errorf("a patient caller: got error %v, want none", err)
						}
					})
				}
				wg.Wait()
				if slow.Fired() == 0 {
					t.Error("slow handshakes: got none, want some")
				}
				proxy.Clear()
			}
		})
	}
}
