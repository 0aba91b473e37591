package conformance_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/conformance/internal/mutant"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// The text is the reply to itself; the proxy loses the replies that the function chooses.
func TestProxy(t *testing.T) {
	echo, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	var executed atomic.Int64
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() {
				b := make([]byte, 64)
				for {
					n, err := c.Read(b)
					if err != nil {
						c.Close()
						return
					}
					executed.Add(1)
					c.Write(bytes.ToUpper(b[:n]))
				}
			}()
		}
	}()
	p, err := conformance.NewProxy(echo.Addr().String(), func(request, reply []byte) bool {
		return string(request) == "commit" && string(reply) == "COMMIT"
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	var c net.Conn
	dial := func() {
		t.Helper()
		if c, err = net.Dial("tcp", p.Addr()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
	ask := func(text string) string {
		t.Helper()
		if _, err := io.WriteString(c, text); err != nil {
			return "not sent"
		}
		b := make([]byte, 64)
		n, err := c.Read(b)
		if err != nil {
			return "lost"
		}
		return string(b[:n])
	}
	want := func(text, answer string, n int64) {
		t.Helper()
		before := executed.Load()
		if got := ask(text); got != answer || executed.Load() != before+n {
			t.Errorf("%s: got %s, executed %d times, want %s, %d times", text, got, executed.Load()-before, answer, n)
		}
	}
	dial()
	want("begin", "BEGIN", 1)
	want("commit", "COMMIT", 1)
	p.Set(conformance.LostReply)
	want("begin", "BEGIN", 1)
	want("commit", "lost", 1)
	p.Set(conformance.Refused)
	dial()
	want("begin", "lost", 0)
	p.Set(conformance.Frozen)
	dial()
	answered := make(chan string, 1)
	go func() { answered <- ask("commit") }()
	select {
	case a := <-answered:
		t.Errorf("commit on a frozen connection: got %s, want no answer before it thaws", a)
	case <-time.After(50 * time.Millisecond):
	}
	p.Set(conformance.NoFault)
	if a := <-answered; a != "COMMIT" {
		t.Errorf("commit on a connection that thaws: got %s, want COMMIT", a)
	}
	for range 2 {
		if err := p.Close(); err != nil {
			t.Errorf("Close: got %v, want nil", err)
		}
	}
	if _, err := net.Dial("tcp", p.Addr()); err == nil {
		t.Error("Dial after Close: got no error, want one")
	}
}

// table is a KV that keeps nothing and counts its swaps.
type table struct {
	driver.KV
	swaps atomic.Int64
}

func (t *table) Load(_ context.Context, keys []string) ([]driver.Entry, quota.Micros, error) {
	es := make([]driver.Entry, len(keys))
	for i := range es {
		es[i].Key = keys[i]
	}
	return es, 1 << 50, nil
}

func (t *table) Swap(context.Context, []driver.Change) (bool, error) {
	t.swaps.Add(1)
	return true, nil
}

func TestFaultyKV(t *testing.T) {
	ctx := t.Context()
	kv := &table{}
	f, set := conformance.FaultyKV(kv, nil)
	swap := func(ctx context.Context) (bool, error) { return f.Swap(ctx, []driver.Change{{Value: "v"}}) }
	want := func(what string, swapped bool, charged quota.ChargeState, n int64) {
		t.Helper()
		before := kv.swaps.Load()
		got, err := swap(ctx)
		if got != swapped || quota.Charged(err) != charged || kv.swaps.Load() != before+n {
			t.Errorf("Swap under %s: got %t, error %v, executed %d times, want %t, charged %s, executed %d times", what, got, err, kv.swaps.Load()-before, swapped, charged, n)
		}
	}
	want("no fault", true, quota.WasCharged, 1)
	set(conformance.LostReply)
	if _, _, err := f.Load(ctx, []string{"k"}); err != nil {
		t.Errorf("Load where replies to charges are lost: got %v, want nil", err)
	}
	want("lost reply", false, quota.ChargeUnknown, 1)
	set(conformance.Refused)
	if _, _, err := f.Load(ctx, []string{"k"}); quota.Charged(err) != quota.NotCharged {
		t.Errorf("Load, refused: got %v, want an error that says not charged", err)
	}
	want("refused", false, quota.NotCharged, 0)
	// A caller that leaves a frozen server does not take its request along.
	set(conformance.Frozen)
	brief, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if _, err := swap(brief); !errors.Is(err, context.DeadlineExceeded) || driver.Sentinel(err) != nil {
		t.Errorf("Swap, frozen: got %v, want the context's error, of an unknown outcome", err)
	}
	before := kv.swaps.Load()
	set(conformance.NoFault)
	for start := time.Now(); kv.swaps.Load() == before && time.Since(start) < 10*time.Second; {
		time.Sleep(time.Millisecond)
	}
	if got := kv.swaps.Load() - before; got != 1 {
		t.Errorf("the request that a frozen server had got: executed %d times when it thawed, want once", got)
	}
	f, set = conformance.FaultyKV(kv, &conformance.FaultyOptions{Repeats: true})
	set(conformance.LostReply)
	want("lost reply", false, quota.ChargeUnknown, 1)
	want("lost reply, with a client that repeats", true, quota.WasCharged, 2)
}

func TestFaultyStore(t *testing.T) {
	ctx := t.Context()
	below := local.New()
	defer below.Close()
	s, set := conformance.FaultyStore(below)
	c := quota.Charge{Limit: quota.NewLimit("tokens", algorithm.TokenBucket(100, 1, time.Hour)), Key: "k", Cost: 1}
	want := func(f conformance.Fault, charged quota.ChargeState, n int64) {
		t.Helper()
		peek := c
		peek.Op = quota.OpPeek
		before, _ := below.Charge(ctx, peek)
		set(f)
		brief, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
		defer cancel()
		_, err := s.Charge(brief, c)
		after, _ := below.Charge(ctx, peek)
		if got := before.Remaining - after.Remaining; quota.Charged(err) != charged || got != n {
			t.Errorf("Charge under %s: got error %v, %d charged, want charged %s, %d", f, err, got, charged, n)
		}
	}
	want(conformance.NoFault, quota.WasCharged, 1)
	want(conformance.Refused, quota.NotCharged, 0)
	want(conformance.LostReply, quota.ChargeUnknown, 1)
	want(conformance.Frozen, quota.ChargeUnknown, 0)
	set(conformance.NoFault)
	if !driver.IsPrompt(s) {
		t.Error("a faulty store over a prompt one: got not prompt, want prompt")
	}
}

// serverVariable names the server to the other process.
const serverVariable = "CONFORMANCE_TEST_REDIS"

// A store on a server passes with handles in two processes; a store whose data are in its process fails.
func TestProcesses(t *testing.T) {
	cases := []string{"C4_Atomic/processes", "C4_Atomic/budget_of_processes", "C4_Atomic/ids_of_processes"}
	t.Run("on a server", func(t *testing.T) {
		addr := os.Getenv(serverVariable)
		if addr == "" {
			addr = redisserver.Start(t).Addr()
		}
		client := redis.NewClient(&redis.Options{Addr: addr, ContextTimeoutEnabled: true})
		t.Cleanup(func() { client.Close() })
		r := conformance.Examine(t, conformance.Harness{
			Open: func(t testing.TB, o conformance.Opening) quota.Store {
				s, err := goredis.New(client, &goredis.Options{Prefix: o.Data + ":", Clock: o.Clock})
				if err != nil {
					t.Fatal(err)
				}
				return s
			},
			Process: func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, serverVariable+"="+addr) },
		}, 0, cases...)
		for _, c := range r.Results {
			if c.Outcome != conformance.Passed {
				t.Errorf("%s: got %s, want %s\n%s", c.Case, c.Outcome, conformance.Passed, c.Text)
			}
		}
		if !r.Processes {
			t.Error("report: got no processes, want them noted")
		}
	})
	t.Run("in one process", func(t *testing.T) {
		h := harness(mutant.Sound, false)
		h.Process = func(*exec.Cmd) {}
		for _, c := range conformance.Examine(t, h, 0, cases...).Results {
			if c.Outcome != conformance.Provisional {
				t.Errorf("%s: got %s, want %s\n%s", c.Case, c.Outcome, conformance.Provisional, c.Text)
			}
		}
	})
	t.Run("that does not start", func(t *testing.T) {
		h := harness(mutant.Sound, false)
		h.Process = func(cmd *exec.Cmd) { cmd.Args = append(cmd.Args, "-no-such-flag") }
		for _, c := range conformance.Examine(t, h, 0, cases[0]).Results {
			if c.Outcome != conformance.Provisional || !strings.Contains(c.Text, "no-such-flag") {
				t.Errorf("%s: got %s, want %s, with the output of the process\n%s", c.Case, c.Outcome, conformance.Provisional, c.Text)
			}
		}
	})
}

// asking is a wrapper that asks a second time for a decision that comes late: with an id, or with the fault always.
type asking struct {
	quota.Store
	fault bool
}

func (s asking) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	brief, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	err := s.Store.ChargeAll(brief, cs, out)
	if brief.Err() != nil && ctx.Err() == nil && (s.fault || cs[0].ID != "") && quota.Charged(err) == quota.ChargeUnknown {
		err = s.Store.ChargeAll(ctx, cs, out)
	}
	return err
}

func (s asking) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	var out [1]quota.Decision
	err := s.ChargeAll(ctx, []quota.Charge{c}, out[:])
	return out[0], err
}

// Wrappers that make two calls for a decision are failed where the second comes after a fault, and their twins pass.
func TestWrappersOfTwoCalls(t *testing.T) {
	for _, m := range []struct {
		name, of string
		lacks    []conformance.Lack
		wrap     func(s quota.Store, fault bool) quota.Store
	}{
		{"a second call for a decision that is late", "S4_AtMostOnce/calls_and_faults", nil,
			func(s quota.Store, fault bool) quota.Store { return asking{s, fault} }},
	} {
		for _, fault := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, %t", m.name, fault), func(t *testing.T) {
				t.Parallel()
				sound := harness(mutant.Sound, false)
				h := conformance.Harness{
					Lacks: m.lacks,
					Open:  func(t testing.TB, o conformance.Opening) quota.Store { return m.wrap(sound.Open(t, o), fault) },
					Fault: func(t testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
						s, set := conformance.FaultyStore(sound.Open(t, o))
						return m.wrap(s, fault), set
					},
				}
				want := conformance.Passed
				if fault {
					want = conformance.Provisional
				}
				var r conformance.Result
				for range 5 { // a late answer must come between two calls
					if r = conformance.Examine(t, h, 0, m.of).Results[0]; r.Outcome == want && fault {
						break
					}
				}
				if r.Outcome != want {
					t.Errorf("%s: got %s, want %s\n%s", m.of, r.Outcome, want, r.Text)
				}
			})
		}
	}
}
