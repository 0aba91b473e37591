package resilience_test

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend"
	_ "github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/local"
	_ "github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/internal/bound"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// The fleet of the tests in this file: processes that run this test binary, each with the preset around its
// store, and a client library that it shares with half of the others.
const (
	outageProcesses = 4
	outageTimeout   = 100 * time.Millisecond
	outageDelay     = 300 * time.Millisecond

	// What the figures may be; the test logs them. What the machine is late by is measured too, and added
	// thrice, for a decision waits for it more than once.
	outageSlowest  = outageTimeout + 50*time.Millisecond
	outageRecovery = outageDelay + 2*time.Second
	outageOpenP99  = 50 * time.Millisecond // loose: on a quiet machine it is 1 ms
)

var (
	hotRule = bound.Rule{Capacity: 100, Refill: 20, Instances: outageProcesses}
	hot     = bucket("hot", hotRule.Capacity, hotRule.Refill, time.Second)
	// Of this one an instance's share is 0.
	fewRule = bound.Rule{Capacity: outageProcesses - 1, Refill: 20, Instances: outageProcesses}
	few     = bucket("few", fewRule.Capacity, fewRule.Refill, time.Second)
	// Of this one there is always enough, and it does not refill, so that its state is a ledger.
	counted = bucket("counted", 80_000, 1, time.Hour)
)

// outageReport is what a process did.
type outageReport struct {
	Hot, Few, Counted bound.Sum
	Unknown           int64 // of counted: tokens of unknown outcome at the primary
	First, Last       int64 // µs since the epoch
	Calls             []outageCall
	Errors            map[string]int
	Stall             time.Duration // the most by which a pause was too long
}

// outageCall is a decision: when it was asked for, how long it took, whether the breaker was open then, and
// whether the primary made it.
type outageCall struct {
	At, Took    int64 // µs
	Open, Store bool
}

// TestOutageKilled kills a server without persistence, under load, and starts it again, five times.
func TestOutageKilled(t *testing.T) {
	server := redisserver.Start(t)
	up := time.Duration(sized(800, 3000)) * time.Millisecond
	f := startFleet(t, server.Addr())
	time.Sleep(up)
	for range 5 {
		f.outage(func() { server.Kill() }, time.Duration(sized(400, 3000))*time.Millisecond, func() error { return server.Restart() })
		time.Sleep(up)
	}
	f.stop()
	f.check(5)
}

// TestOutageKept does the same to a server that keeps its state, freezes it, and resets its connections.
func TestOutageKept(t *testing.T) {
	// A reply is not sent before its write is with the kernel, so kill -9 loses nothing.
	server := redisserver.Start(t, "--appendonly", "yes", "--appendfsync", "no")
	proxy := redisserver.StartProxy(t, server.Addr())
	up := time.Duration(sized(700, 3000)) * time.Millisecond
	f := startFleet(t, proxy.Addr())
	time.Sleep(up)
	for range sized(2, 5) {
		f.outage(func() { server.Kill() }, time.Duration(sized(300, 3000))*time.Millisecond, func() error { return server.Restart() })
		time.Sleep(up)
	}
	for range 20 {
		time.Sleep(time.Duration(sized(50, 250)) * time.Millisecond)
		proxy.Reset()
	}
	time.Sleep(up)
	frozen := time.Duration(sized(1500, 5000)) * time.Millisecond
	f.outage(func() {
		if err := server.Pause(); err != nil {
			t.Error(err)
		}
		// Half of the time the clients wait for replies, and half for connections.
		time.Sleep(frozen / 2)
		proxy.Reset()
	}, frozen/2, func() error { return server.Resume() })
	time.Sleep(up)
	f.stop()
	f.check(0)
	f.checkLedger(server.Addr())
}

// outageFleet is the processes as the test sees them.
type outageFleet struct {
	t         *testing.T
	processes []*outageProcess
	ended     []time.Time // of the outages
}

type outageProcess struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout io.Reader
	stderr bytes.Buffer
	report outageReport
}

// startFleet starts the processes, and returns when all are connected and at work.
func startFleet(t *testing.T, addr string) *outageFleet {
	t.Helper()
	f := &outageFleet{t: t}
	for i := range outageProcesses {
		client := [...]string{"goredis", "rueidis"}[i%2]
		p := &outageProcess{cmd: exec.CommandContext(t.Context(), os.Args[0])}
		// The client itself would wait for long.
		p.cmd.Env = append(os.Environ(), outageURL+"=redis://"+addr+"?timeout=10s&client="+client)
		p.cmd.Stderr = &p.stderr
		var err error
		if p.stdin, err = p.cmd.StdinPipe(); err != nil {
			t.Fatal(err)
		}
		if p.stdout, err = p.cmd.StdoutPipe(); err != nil {
			t.Fatal(err)
		}
		if err := p.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		f.processes = append(f.processes, p)
	}
	for i, p := range f.processes {
		if _, err := io.ReadFull(p.stdout, make([]byte, 1)); err != nil {
			t.Fatalf("process %d: %v\n%s", i, err, &p.stderr)
		}
	}
	for _, p := range f.processes {
		if _, err := p.stdin.Write([]byte{'\n'}); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// outage breaks something for a time.
func (f *outageFleet) outage(begin func(), length time.Duration, end func() error) {
	begin()
	time.Sleep(length)
	if err := end(); err != nil {
		f.t.Fatal(err)
	}
	f.ended = append(f.ended, time.Now())
}

// stop ends the load, and returns when every process has settled with the primary and reported.
func (f *outageFleet) stop() {
	f.t.Helper()
	for _, p := range f.processes {
		p.stdin.Close()
	}
	for i, p := range f.processes {
		err := gob.NewDecoder(p.stdout).Decode(&p.report)
		if err = errors.Join(err, p.cmd.Wait()); err != nil {
			f.t.Fatalf("process %d: %v\n%s", i, err, &p.stderr)
		}
		if len(p.report.Errors) > 0 {
			f.t.Errorf("process %d: got the errors %v, want decisions of the fallback", i, p.report.Errors)
		}
	}
}

// check checks the bound, how long decisions took, and how soon the primary made them again.
func (f *outageFleet) check(losses int) {
	f.t.Helper()
	var sum, fewSum bound.Sum
	first, last := f.processes[0].report.First, f.processes[0].report.Last
	var open []int64
	var slowest int64
	var latest, stall time.Duration
	for i, p := range f.processes {
		r := &p.report
		sum, fewSum = sum.Add(r.Hot), fewSum.Add(r.Few)
		first, last = min(first, r.First), max(last, r.Last)
		stall = max(stall, r.Stall)
		for _, c := range r.Calls {
			slowest = max(slowest, c.Took)
			if c.Open {
				open = append(open, c.Took)
			}
			if limit := outageSlowest + 3*r.Stall; c.Took > limit.Microseconds() {
				f.t.Errorf("process %d: a decision took %d µs, want up to %v", i, c.Took, limit)
			}
		}
		for n, ended := range f.ended {
			back, known := r.back(ended)
			if n == len(f.ended)-1 && (!known || back > outageRecovery+3*r.Stall) {
				f.t.Errorf("process %d: after the last outage the primary decided after %v, %v; want within %v", i, back, known, outageRecovery)
			}
			latest = max(latest, back)
		}
	}
	f.t.Logf("after an outage the primary made its first decision within %v for every process", latest)
	elapsed := time.Duration(last-first) * time.Microsecond
	most := hotRule.Bound(elapsed, sum.Served, losses)
	f.t.Logf("admitted %d in %v, %d of them in the primary's place; at most %d: %+v", sum.Admitted(), elapsed, sum.Fallback, most.Sum(), most)
	if sum.Admitted() > most.Sum() {
		f.t.Errorf("admitted: got %d, want up to %d", sum.Admitted(), most.Sum())
	}
	if most := fewRule.Bound(elapsed, fewSum.Served, losses); fewSum.Admitted() > most.Sum() || fewSum.Fallback > 0 || fewSum.Store == 0 {
		f.t.Errorf("with shares of 0: got %d admitted, %d of them in the primary's place; want 1 to %d, and 0", fewSum.Admitted(), fewSum.Fallback, most.Sum())
	}
	if sum.Store < hotRule.Capacity || sum.Fallback == 0 || len(open) < 100 {
		f.t.Errorf("got %d admitted by the primary, %d by the fallbacks, %d decisions with an open breaker; want %d, 1 and 100 or more", sum.Store, sum.Fallback, len(open), hotRule.Capacity)
		return
	}
	slices.Sort(open)
	p99 := open[len(open)*99/100]
	f.t.Logf("the slowest decision took %d µs, where a pause was too long by up to %d µs; with an open breaker, of %d, half took up to %d µs, 99 of 100 up to %d µs", slowest, stall.Microseconds(), len(open), open[len(open)/2], p99)
	if limit := outageOpenP99.Microseconds(); p99 > limit {
		f.t.Errorf("with an open breaker 99 of 100 decisions took up to %d µs, want up to %d", p99, limit)
	}
}

// back returns how long after a time the primary made its first decision that was asked for after it.
func (r *outageReport) back(from time.Time) (time.Duration, bool) {
	at := from.UnixMicro()
	least := int64(-1)
	for _, c := range r.Calls {
		if after := c.At + c.Took - at; c.Store && c.At >= at && (least < 0 || after < least) {
			least = after
		}
	}
	return time.Duration(least) * time.Microsecond, least >= 0
}

// checkLedger compares what the server has charged with what the processes know of: what it granted, what was
// admitted in its place and reconciled, and what is unknown.
func (f *outageFleet) checkLedger(addr string) {
	f.t.Helper()
	store, err := backend.Open(f.t.Context(), "redis://"+addr)
	if err != nil {
		f.t.Fatal(err)
	}
	defer store.Close()
	d, err := store.Charge(f.t.Context(), quota.Charge{Limit: counted, Key: outageKey, Op: quota.OpPeek})
	if err != nil {
		f.t.Fatal(err)
	}
	charged := d.Capacity - d.Remaining
	var sum bound.Sum
	var unknown int64
	for _, p := range f.processes {
		sum = sum.Add(p.report.Counted)
		unknown += p.report.Unknown
	}
	f.t.Logf("charged %d: %d granted, %d reconciled, up to %d unknown", charged, sum.Store, sum.Fallback, unknown)
	if charged < sum.Admitted() || charged > sum.Admitted()+unknown {
		f.t.Errorf("charged: got %d, want the %d granted and the %d admitted in its place, and up to %d unknown", charged, sum.Store, sum.Fallback, unknown)
	}
	if sum.Store == 0 || sum.Fallback == 0 || unknown == 0 {
		f.t.Errorf("got %d granted, %d reconciled and %d unknown, want none of them 0", sum.Store, sum.Fallback, unknown)
	}
}

// outageURL is the environment variable that makes a process of this binary a member of a fleet.
const outageURL = "FLEETQUOTA_TEST_OUTAGE_URL"

const outageKey = "everyone"

// outageMember is such a process: it says when it is connected, begins when it is told to, and reports when its
// standard input ends.
func outageMember(url string) error {
	store, err := backend.Open(bg, url)
	if err != nil {
		return err
	}
	// The preset in two steps, to see what happens inside the fallback.
	safe, err := resilience.Standard(store, resilience.FailWithError(), &resilience.StandardOptions{
		Timeout: outageTimeout,
		Breaker: &resilience.BreakerOptions{Delay: outageDelay},
	})
	if err != nil {
		return err
	}
	spy := &outageSpy{Store: safe}
	m := &member{errors: map[string]int{}}
	m.store, err = resilience.Wrap(spy, resilience.Fallback(local.New(), resilience.Instances(outageProcesses), nil))
	if err != nil {
		return err
	}
	defer m.store.Close()
	if _, err := store.Charge(bg, quota.Charge{Limit: counted, Key: "hello", Op: quota.OpPeek}); err != nil {
		return err
	}
	if _, err := os.Stdout.Write([]byte{'.'}); err != nil {
		return err
	}
	if _, err := io.ReadFull(os.Stdin, make([]byte, 1)); err != nil {
		return err
	}
	began := time.Now()
	ctx, cancel := context.WithCancel(bg)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for ctx.Err() == nil {
				time.Sleep(rand.N(20 * time.Millisecond))
				switch rand.IntN(8) {
				case 0, 1:
					m.take(counted, &m.counted, quota.OpTake)
				case 2:
					m.take(few, &m.few, quota.OpTake)
				default:
					m.take(hot, &m.hot, quota.OpTake)
				}
			}
		})
	}
	var stall time.Duration
	all.Go(func() {
		const length = 5 * time.Millisecond
		for ctx.Err() == nil {
			from := time.Now()
			time.Sleep(length)
			stall = max(stall, time.Since(from)-length)
		}
	})
	io.Copy(io.Discard, os.Stdin)
	cancel()
	all.Wait()
	ended := time.Now()
	// What the primary answers has been reconciled.
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		one, two := m.take(counted, nil, quota.OpPeek), m.take(hot, nil, quota.OpPeek)
		if one && two {
			break
		}
		if time.Now().After(end) {
			return errors.New("the primary does not answer in the end")
		}
	}
	return gob.NewEncoder(os.Stdout).Encode(outageReport{
		Hot: m.hot.Sum(), Few: m.few.Sum(), Counted: m.counted.Sum(), Unknown: spy.unknown.Load(),
		First: began.UnixMicro(), Last: ended.UnixMicro(), Calls: m.calls, Errors: m.errors, Stall: stall,
	})
}

type member struct {
	store             quota.Store
	hot, few, counted bound.Account

	mu     sync.Mutex
	calls  []outageCall
	errors map[string]int
}

// take makes a call, notes it, and reports whether the primary made the decision.
func (m *member) take(l *quota.Limit, account *bound.Account, op quota.Op) bool {
	const cost = 1
	open := resilience.BreakerState(m.store) == "open"
	asked := time.Now()
	d, err := m.store.Charge(bg, quota.Charge{Limit: l, Key: outageKey, Cost: cost, Op: op})
	took := time.Since(asked)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		m.errors[err.Error()]++
		return false
	}
	if account != nil {
		account.Add(asked, cost, d)
	}
	m.calls = append(m.calls, outageCall{asked.UnixMicro(), took.Microseconds(), open, d.Source == quota.FromStore})
	return d.Source == quota.FromStore
}

// outageSpy counts what is of unknown outcome between a fallback and its primary.
type outageSpy struct {
	quota.Store
	unknown atomic.Int64
}

func (s *outageSpy) Unwrap() quota.Store { return s.Store }

func (s *outageSpy) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	d, err := s.Store.Charge(ctx, c)
	if errors.Is(err, quota.ErrIndeterminate) && c.Limit == counted && c.Op == quota.OpTake {
		s.unknown.Add(c.Cost)
	}
	return d, err
}
