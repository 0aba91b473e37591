package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// place is a Client of some servers. It answers scripts with fresh states.
type place struct {
	mu      sync.Mutex
	who     func(key string) (Reply, error) // answers a question for the server's identity
	refuses func(keys []string) error       // of the others; nil refuses none
	asked   int
	scripts [][]string // the keys of the others
}

func (p *place) Do(_ context.Context, args []any, keys int) (Reply, error) {
	var names []string
	for _, k := range args[3 : 3+keys] {
		names = append(names, k.(string))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if args[1] == identityText {
		p.asked++
		return p.who(names[0])
	}
	p.scripts = append(p.scripts, names)
	if p.refuses != nil {
		if err := p.refuses(names); err != nil {
			return nil, err
		}
	}
	return freshReply(args, keys), nil
}

func (*place) Info(context.Context) ([]string, error) { return nil, nil }
func (*place) Close() error                           { return nil }

// server returns the answers of a server.
func server(id, mode string) func(string) (Reply, error) {
	return func(string) (Reply, error) { return elements{id, mode}, nil }
}

// tags returns the most hash tags that a script held.
func (p *place) tags() (most int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, keys := range p.scripts {
		seen := map[string]bool{}
		for _, k := range keys {
			seen[tag(k)] = true
		}
		most = max(most, len(seen))
	}
	return most
}

// open returns a store over a place, and the notices that it gave.
func (p *place) open(t *testing.T, o Options) (*Store, func() []string) {
	t.Helper()
	var mu sync.Mutex
	var told []string
	o.Notice = func(n quota.Notice) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, n.Name+": "+n.Text)
	}
	s, err := New(p, false, o)
	if err != nil {
		t.Fatal(err)
	}
	return s, func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(told)
	}
}

var batchLimit = limitOf("n", window(10))

func chargeOf(key string) quota.Charge { return quota.Charge{Limit: batchLimit, Key: key, Cost: 1} }

// A store learns whether it has one server, and tells if it has not, or cannot know.
func TestLearn(t *testing.T) {
	refused := func(text string) func(string) (Reply, error) {
		return func(string) (Reply, error) { return nil, ReplyError(errors.New(text)) }
	}
	last := "quota:" + probeTags()[probes-1]
	for name, test := range map[string]struct {
		who    func(string) (Reply, error)
		state  uint32
		notice string // a part of it, or "" for none
		failed bool
	}{
		"one": {server("a1", "standalone"), oneServer, "", false},
		"a proxy": {func(k string) (Reply, error) {
			return elements{map[bool]string{k == last: "a", k != last: "b"}[true], "standalone"}, nil
		}, several, "2 servers", false},
		"a node":   {server("a1", "cluster"), several, "redis+cluster://", false},
		"no id":    {server("", "standalone"), unknown, "batching=all", true},
		"no mode":  {server("a1", ""), unknown, "batching=all", true},
		"a watch":  {server("a1", "sentinel"), unknown, `"sentinel"`, true},
		"7, INFO":  {refused("ERR ACL failure in script: User app has no permissions to run the 'info' command script: 1"), unknown, "the user lacks +info", true},
		"6, INFO":  {refused("ERR Error running script (call to f_8d): @user_script:1: @user_script: 1: -NOPERM this user has no permissions to run the 'info' command or its subcommand"), unknown, "the user lacks +info", true},
		"a double": {refused("ERR section (server) is not supported"), unknown, "batching=all", true},
		"a shape":  {func(string) (Reply, error) { return elements{int64(1)}, nil }, unknown, "batching=all", true},
		"loading":  {refused("LOADING wait"), unknown, "", true},
		"lost":     {func(string) (Reply, error) { return nil, TransportError(io.EOF) }, unknown, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			s, told := (&place{who: test.who}).open(t, Options{})
			for range 2 { // told once
				if err := s.learn(bg); (err != nil) != test.failed {
					t.Errorf("learn: got error %v, want one: %v", err, test.failed)
				}
			}
			if got := s.reach.state.Load(); got != test.state {
				t.Errorf("state: got %d, want %d", got, test.state)
			}
			got := told()
			if test.notice == "" && len(got) > 0 || test.notice != "" && (len(got) != 1 || !strings.HasPrefix(got[0], "batching: ") || !strings.Contains(got[0], test.notice)) {
				t.Errorf("notices: got %q, want %q", got, test.notice)
			}
		})
	}
}

// The questions are for keys in 16 parts of the range of slots, and write nothing.
func TestProbes(t *testing.T) {
	parts := map[uint16]bool{}
	for _, tag := range probeTags() {
		parts[slot(tag)/(Slots/probes)] = true
	}
	if len(parts) != probes {
		t.Errorf("parts of the range: got %d, want %d", len(parts), probes)
	}
	var keys []string
	p := &place{who: func(k string) (Reply, error) {
		keys = append(keys, k)
		return elements{"a", "standalone"}, nil
	}}
	s, _ := p.open(t, Options{Prefix: "app:"})
	if err := s.learn(bg); err != nil {
		t.Fatal(err)
	}
	slices.Sort(keys)
	if len(slices.Compact(keys)) != probes || !strings.HasPrefix(keys[0], "app:{") {
		t.Errorf("keys: got %q, want %d with the store's prefix", keys, probes)
	}
	if strings.Contains(identityText, "SET") || len(p.scripts) > 0 {
		t.Errorf("scripts beside the questions: got %q, want none", p.scripts)
	}
}

// Which stores ask: only those whose options do not say it.
func TestAsksOnlyIfNeeded(t *testing.T) {
	for _, test := range []struct {
		o     Options
		asks  bool
		grade driver.Atomicity
	}{
		{Options{}, true, driver.OneGroup},
		{Options{Strict: true}, true, driver.OneGroup},
		{Options{Batching: BatchNone}, true, driver.OneGroup},
		{Options{Batching: BatchSlot}, false, driver.OneGroup},
		{Options{Batching: BatchAll}, false, driver.AnyKeys},
	} {
		p := &place{who: server("a", "standalone")}
		s, _ := p.open(t, test.o)
		if got := s.Atomicity(); got != test.grade {
			t.Errorf("%+v: Atomicity: got %v, want %v", test.o, got, test.grade)
		}
		if _, err := s.Charge(bg, chargeOf("a")); err != nil {
			t.Fatal(err)
		}
		s.attempts.Wait()
		if got := p.asked > 0; got != test.asks {
			t.Errorf("%+v: asked for the server: got %v, want %v", test.o, got, test.asks)
		}
		if got := s.Atomicity(); got != test.grade {
			t.Errorf("%+v: Atomicity afterwards: got %v, want %v", test.o, got, test.grade)
		}
	}
}

func TestOptionsBatching(t *testing.T) {
	for _, test := range []struct {
		o       Options
		cluster bool
		want    string
	}{
		{Options{Batching: 4}, false, "Options.Batching is 4; accepted: BatchAuto, BatchSlot, BatchAll or BatchNone"},
		{Options{Batching: BatchAll}, true, "Options.Batching is BatchAll; accepted with a cluster: BatchAuto, BatchSlot or BatchNone"},
		{Options{Batching: BatchAll, Strict: true}, false, "Options.Batching is BatchAll; accepted with Options.Strict: BatchAuto, BatchSlot or BatchNone"},
	} {
		if _, err := New(&place{}, test.cluster, test.o); !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: got error %v, want ErrInvalid with %q", test.o, err, test.want)
		}
	}
}

// The store learns after its first decision, after a lost connection, and with Health. While it does not know, no
// script holds keys with two hash tags.
func TestLearnsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &place{who: server("a", "standalone")}
		s, _ := p.open(t, Options{})
		defer s.Close()
		list := []quota.Charge{chargeOf("a"), chargeOf("b")}
		out := make([]quota.Decision, 2)
		listed := func(when string, split bool, asked int) {
			t.Helper()
			p.asked, p.scripts = 0, nil
			if err := s.ChargeAll(bg, list, out); err != nil || out[0].Split != split || out[1].Split != split {
				t.Errorf("%s: got %+v, error %v; want split %v", when, out, err, split)
			}
			if got := p.tags() > 1; got == split {
				t.Errorf("%s: a script with two hash tags: got %v, want %v", when, got, !split)
			}
			synctest.Wait()
			if p.asked != asked {
				t.Errorf("%s: questions: got %d, want %d", when, p.asked, asked)
			}
		}
		listed("at first", true, probes)
		listed("one server", false, 0)
		p.refuses = func([]string) error { return TransportError(io.EOF) }
		s.Charge(bg, chargeOf("a"))
		p.refuses = nil
		listed("a lost connection", true, probes)
		listed("one server again", false, 0)
		time.Sleep(learnPause)
		s.Dialed()
		listed("a new connection", false, probes)
		p.who = server("a", "cluster")
		if _, err := s.Health(bg); err != nil {
			t.Error(err)
		}
		listed("a node of a cluster", true, 0)
		p.who = server("a", "standalone")
		if _, err := s.Health(bg); err != nil {
			t.Error(err)
		}
		listed("one server after all", false, 0)

		// A question that fails is asked again, with pauses.
		p.refuses = func([]string) error { return TransportError(io.EOF) }
		s.Charge(bg, chargeOf("a"))
		p.refuses, p.who = nil, func(string) (Reply, error) { return nil, TransportError(context.DeadlineExceeded) }
		listed("no answer", true, 1)
		listed("a moment later", true, 0)
		time.Sleep(learnPause)
		p.who = server("a", "standalone")
		listed("after the pause", true, probes)
		listed("one server in the end", false, 0)
	})
}

// warmPlace is a place that is made ready first.
type warmPlace struct{ *place }

func (warmPlace) Warm(context.Context, string, string) error { return nil }
func (warmPlace) Ping(context.Context, string, string) error { return nil }

// Where a server is made ready, the store learns before the first charge goes; but a server that does not answer the
// questions does not hold the charges up for good.
func TestLearnsWhileGettingReady(t *testing.T) {
	for _, lost := range []bool{false, true} {
		p := &place{who: server("a", "standalone")}
		if lost {
			p.who = func(string) (Reply, error) { return nil, TransportError(context.DeadlineExceeded) }
		}
		s, err := New(warmPlace{p}, false, Options{})
		if err != nil {
			t.Fatal(err)
		}
		s.unnamed.probed.Store(true)
		out := make([]quota.Decision, 2)
		if err := s.ChargeAll(bg, []quota.Charge{chargeOf("a"), chargeOf("b")}, out); err != nil || out[0].Split != lost {
			t.Errorf("questions lost: %v: the first list: got %+v, error %v; want it decided, in parts: %v", lost, out, err, lost)
		}
		s.Close()
	}
}

// A call that timed out tells nothing of the server: what is known holds, and is asked again.
func TestTimeoutKeepsTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &place{who: server("a", "standalone")}
		s, _ := p.open(t, Options{})
		defer s.Close()
		s.learn(bg)
		p.refuses = func([]string) error { return TransportError(context.DeadlineExceeded) }
		s.Charge(bg, chargeOf("a"))
		if p.refuses = nil; !s.anyKeys() {
			t.Error("one server: got false after a timeout, want true")
		}
		p.asked = 0
		time.Sleep(learnPause)
		s.Charge(bg, chargeOf("a"))
		if synctest.Wait(); p.asked != probes {
			t.Errorf("questions: got %d, want %d", p.asked, probes)
		}
	})
}

// A batch that the server refuses because of its slots is decided in parts, and the callers do not hear of it. It is
// remembered, and told once.
func TestCrossSlotBatch(t *testing.T) {
	for _, reply := range []string{"CROSSSLOT Keys in request don't hash to the same slot", "ERR eval/evalsha command keys must be in same slot"} {
		for _, batching := range []Batching{BatchAuto, BatchAll} {
			p := &place{who: server("a", "standalone"), refuses: func(keys []string) error {
				for _, k := range keys {
					if tag(k) != tag(keys[0]) {
						return ReplyError(errors.New(reply))
					}
				}
				return nil
			}}
			s, told := p.open(t, Options{Batching: batching})
			s.learn(bg)
			calls := [][]quota.Charge{{chargeOf("a")}, {chargeOf("b")}, {chargeOf("a/1"), chargeOf("a/2")}, {chargeOf("c")}}
			for round := range 2 {
				p.scripts = nil
				ds, errs := Together(bg, s, calls)
				for i := range calls {
					if errs[i] != nil || !ds[i][0].Allowed {
						t.Errorf("%q, %d: call %d of round %d: got %+v, error %v; want a grant", reply, batching, i, round, ds[i], errs[i])
					}
				}
				if got := p.tags() > 1; got != (round == 0) {
					t.Errorf("%q, %d: a script with several hash tags in round %d: got %v, want %v", reply, batching, round, got, round == 0)
				}
			}
			s.learn(bg) // which would say one server
			if s.anyKeys() {
				t.Errorf("%q, %d: one server: got true after the refusal, want false", reply, batching)
			}
			if got := told(); len(got) != 1 || !strings.Contains(got[0], "CROSSSLOT") {
				t.Errorf("%q, %d: notices: got %q, want one about the refusal", reply, batching, got)
			}
			// A list is decided in parts, or refused where the caller vouched for one server.
			out := make([]quota.Decision, 2)
			err := s.ChargeAll(bg, []quota.Charge{chargeOf("a"), chargeOf("b")}, out)
			if batching == BatchAll && !errors.Is(err, quota.ErrCrossSlot) {
				t.Errorf("%q: a list under BatchAll: got error %v, want ErrCrossSlot", reply, err)
			}
			if batching == BatchAuto && (err != nil || !out[0].Split || !out[1].Split) {
				t.Errorf("%q: a list: got %+v, error %v; want it decided in parts", reply, out, err)
			}
		}
	}
}

// A list that the server refuses because of its slots is decided in parts at once; so is one by compare-and-swap.
func TestCrossSlotList(t *testing.T) {
	p := &place{who: server("a", "standalone"), refuses: func(keys []string) error {
		if len(keys) > 1 {
			return ReplyError(errors.New("CROSSSLOT Keys in request don't hash to the same slot"))
		}
		return nil
	}}
	s, _ := p.open(t, Options{})
	s.learn(bg)
	out := make([]quota.Decision, 2)
	if err := s.ChargeAll(bg, []quota.Charge{chargeOf("a"), chargeOf("b")}, out); err != nil || !out[0].Split || !out[0].Allowed {
		t.Errorf("a list: got %+v, error %v; want a grant in parts", out, err)
	}
}

// Charges and lists that waited while there was one server, and are sent when that is not known any more, go by hash
// tag.
func TestForgetsWhileWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGathering(t, false, Options{})
		g.store.o.Batching = BatchAuto // which learnt, so to speak, that there is one server
		g.fill("a", maxInFlight)
		rest := g.fill("b", 3)
		out := make([]quota.Decision, 2)
		var err error
		g.wg.Go(func() { err = g.store.ChargeAll(bg, []quota.Charge{chargeOf("c"), chargeOf("d")}, out) })
		synctest.Wait()
		g.store.Forget()
		g.store.reach.due.Store(false)
		g.answer(0, nil)
		g.keys(t, 1, 1, 1, 1, 1, 1, 1)
		g.end()
		allowed(t, rest...)
		if err != nil || !out[0].Split {
			t.Errorf("the list: got %+v, error %v; want it decided in parts", out, err)
		}
		for _, c := range g.calls {
			if c.keys > 1 {
				t.Errorf("a script has keys %v, want one key", c.args[3:3+c.keys])
			}
		}
	})
}

// With Strict a batch holds keys of one slot, also where one server is known.
func TestStrictBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGathering(t, false, Options{Strict: true})
		g.store.reach.state.Store(oneServer)
		g.store.reach.due.Store(false)
		g.fill("team/", maxInFlight+3)
		g.fill("other", 1)
		g.keys(t, 1, 1, 1, 1, 1)
		g.answer(0, nil)
		g.keys(t, 1, 1, 1, 1, 1, 3)
		g.end()
	})
}

// A queue that is made after Close is closed.
func TestSlotQueuesClose(t *testing.T) {
	var q slotQueues
	before := q.of(7)
	q.close()
	for i, queue := range []*Queue[queued]{before, q.of(7), q.of(Slots - 1)} {
		if _, _, err := queue.enter(); !errors.Is(err, quota.ErrClosed) {
			t.Errorf("queue %d: got error %v, want ErrClosed", i, err)
		}
	}
	if fmt.Sprintf("%p", before) != fmt.Sprintf("%p", q.of(7)) {
		t.Error("the queue of a slot: got another at the second call, want the same")
	}
}
