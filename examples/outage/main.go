// Command outage runs a fleet while its redis-server is killed and started again, and shows how well a limit
// is kept meanwhile.
//
//	go run ./examples/outage
//
// It needs redis-server 7 or later. Four instances share one token bucket in Redis, each with policies of its
// own around its store, and ask for far more tokens than the bucket gives. For every tenth of a second a line
// shows how many tokens the store and the fallbacks admitted, the state of each instance's circuit breaker,
// and the sum beside the bound that the fallback promises never to exceed. The exit status is 1 if the sum
// exceeded the bound.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/local"
	_ "github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/internal/bound"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

var (
	rule  = bound.Rule{Capacity: 200, Refill: 100, Instances: 4}
	limit = quota.NewLimit("tokens", algorithm.TokenBucket(rule.Capacity, rule.Refill, time.Second))
)

const (
	timeout = 50 * time.Millisecond
	delay   = 400 * time.Millisecond // of an open breaker, at most
	workers = 5                      // of an instance
	line    = 100 * time.Millisecond
)

// plan says when the server is killed and when it is started again, in turn.
type plan struct {
	length time.Duration
	turns  []time.Duration
}

var standard = plan{
	length: 6 * time.Second,
	turns:  []time.Duration{1 * time.Second, 2200 * time.Millisecond, 3500 * time.Millisecond, 4500 * time.Millisecond},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	code := run(ctx, os.Stdout, os.Stderr, standard, ownShare)
	stop()
	os.Exit(code)
}

// ownShare returns the policy by which an instance decides while Redis cannot: on its share of the limit, in
// its own memory.
func ownShare() resilience.Policy {
	return resilience.Fallback(local.New(), resilience.Instances(rule.Instances), nil)
}

// run is the program; it returns the exit status.
func run(ctx context.Context, stdout, stderr io.Writer, p plan, fallback func() resilience.Policy) int {
	fail := func(err error) int {
		fmt.Fprintln(stderr, "outage:", err)
		return 1
	}
	if err := redisserver.Available(); err != nil {
		return fail(fmt.Errorf("this needs redis-server 7 or later on the PATH, or named by FLEETQUOTA_REDIS_SERVER; "+
			"Debian's package is redis-server: %w", err))
	}
	dir, err := os.MkdirTemp("", "outage")
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(dir)
	server, err := redisserver.Launch(dir, redisserver.Config{})
	if err != nil {
		return fail(err)
	}
	defer server.Stop()

	f := &fleet{server: server}
	defer f.close()
	for range rule.Instances {
		if err := f.join(ctx, "redis://"+server.Addr()+"?client=rueidis", fallback()); err != nil {
			return fail(err)
		}
	}
	fmt.Fprintf(stdout, "%d instances share a bucket of %d tokens, and %d more each second, "+
		"in a redis-server that is killed and restarted.\n", rule.Instances, rule.Capacity, rule.Refill)
	fmt.Fprintln(stdout, "Their circuit breakers: - closed, X open, ? half-open.")
	if err := f.work(ctx, stdout, p); err != nil {
		return fail(err)
	}
	return f.report(stdout)
}

// fleet is a server and the instances that share it.
type fleet struct {
	server    *redisserver.Server
	instances []*instance
	start     time.Time
	losses    atomic.Int64 // how often the server lost its state
	slowest   atomic.Int64 // the longest decision since the last line, in ns
}

// instance stands for a process of the fleet.
type instance struct {
	store   quota.Store
	account bound.Account
}

// join adds an instance, once it is connected.
func (f *fleet) join(ctx context.Context, url string, fallback resilience.Policy) error {
	store, err := backend.Open(ctx, url)
	if err != nil {
		return err
	}
	safe, err := resilience.Standard(store, fallback, &resilience.StandardOptions{
		Timeout: timeout,
		Breaker: &resilience.BreakerOptions{Delay: delay},
	})
	if err != nil {
		store.Close()
		return err
	}
	f.instances = append(f.instances, &instance{store: safe})
	_, err = store.Charge(ctx, quota.Charge{Limit: limit, Key: "hello", Op: quota.OpPeek})
	return err
}

func (f *fleet) close() {
	for _, i := range f.instances {
		i.store.Close()
	}
}

// work lets the instances work as planned, and prints a line for every tenth of a second.
func (f *fleet) work(ctx context.Context, w io.Writer, p plan) error {
	ctx, cancel := context.WithTimeout(ctx, p.length+line/2)
	defer cancel()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	f.start = time.Now()
	var all sync.WaitGroup
	for _, i := range f.instances {
		for range workers {
			all.Go(func() { f.ask(ctx, i, fail) })
		}
	}
	all.Go(func() { f.turn(ctx, p.turns, fail) })
	f.follow(ctx, w)
	all.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// ask asks for tokens until the context ends. That end does not cancel a call that has begun.
func (f *fleet) ask(ctx context.Context, i *instance, fail func(error)) {
	for pause(ctx, time.Duration(rand.Int64N(int64(20*time.Millisecond)))) {
		const cost = 1
		asked := time.Now()
		d, err := i.store.Charge(context.WithoutCancel(ctx), quota.Charge{Limit: limit, Key: "everyone", Cost: cost})
		took := int64(time.Since(asked))
		if err != nil {
			fail(err)
			return
		}
		i.account.Add(asked, cost, d)
		for slowest := f.slowest.Load(); took > slowest && !f.slowest.CompareAndSwap(slowest, took); {
			slowest = f.slowest.Load()
		}
	}
}

// turn kills the server and starts it again, in turn.
func (f *fleet) turn(ctx context.Context, turns []time.Duration, fail func(error)) {
	for n, at := range turns {
		if !pause(ctx, time.Until(f.start.Add(at))) {
			return
		}
		if n%2 == 0 {
			f.losses.Add(1)
			f.server.Kill()
		} else if err := f.server.Restart(); err != nil {
			fail(err)
			return
		}
	}
}

// follow prints lines until the context ends.
func (f *fleet) follow(ctx context.Context, w io.Writer) {
	const header = "\n%22s  %22s  %16s  %8s\n%5s  %-6s  %-7s  %11s  %9s  %7s  %7s  %8s\n"
	fmt.Fprintf(w, header, "", "admitted in 0.1 s by", "admitted so far", "slowest",
		"time", "server", "breakers", "the store", "fallback", "", "at most", "decision")
	var before bound.Sum
	for next := line; pause(ctx, time.Until(f.start.Add(next))); next += line {
		now := f.sum()
		fmt.Fprintf(w, "%4.1fs  %-6s  %-8s  %10d  %9d  %7d  %7d  %6.1fms\n", next.Seconds(), f.state(), f.breakers(),
			now.Store-before.Store, now.Fallback-before.Fallback, now.Admitted(), f.most(now).Sum(), float64(f.slowest.Swap(0))/1e6)
		before = now
	}
}

// sum returns the tokens admitted up to now.
func (f *fleet) sum() (sum bound.Sum) {
	for _, i := range f.instances {
		sum = sum.Add(i.account.Sum())
	}
	return sum
}

// most returns how many tokens may have been admitted up to now.
func (f *fleet) most(sum bound.Sum) bound.Terms {
	return rule.Bound(time.Since(f.start), sum.Served, int(f.losses.Load()))
}

func (f *fleet) state() string {
	if f.server.Running() {
		return "up"
	}
	return "killed"
}

// breakers shows the state of each instance's breaker.
func (f *fleet) breakers() string {
	var signs []string
	for _, i := range f.instances {
		signs = append(signs, map[string]string{"closed": "-", "half-open": "?", "open": "X"}[resilience.BreakerState(i.store)])
	}
	return strings.Join(signs, " ")
}

// report prints the check of the bound and returns the exit status.
func (f *fleet) report(w io.Writer) int {
	sum := f.sum()
	most := f.most(sum)
	fmt.Fprintf(w, "\nAdmitted: %d tokens, %d of them in the store's place.\n", sum.Admitted(), sum.Fallback)
	fmt.Fprintf(w, "At most:  %d = %d burst + %d refill + %d bursts and %d refill of the shares + %d for %d losses of the store's state.\n",
		most.Sum(), most.Burst, most.Refill, most.ShareBursts, most.ShareRefills, most.Losses, f.losses.Load())
	switch {
	case sum.Admitted() == 0:
		fmt.Fprintln(w, "No token was admitted, so there is nothing to check.")
		return 1
	case sum.Admitted() > most.Sum():
		fmt.Fprintln(w, "EXCEEDED: more was admitted than the fallback promises.")
		return 1
	}
	fmt.Fprintln(w, "The bound holds.")
	return 0
}

// pause waits for d, and reports false if the context ended before.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
