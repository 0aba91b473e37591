package clienttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// batchCalls: a batch is one script call, whatever is in it, and a key that holds another program's value
// fails only the calls that name it.
func batchCalls(t *testing.T, l library) {
	server, open := l.single(t)
	store := l.engine(open(engine.Options{}))
	a, b := yearly("a", 40), limitOf("b", newRule(bucket, 1000, 1, time.Hour))
	charge := func(l *quota.Limit, key string) quota.Charge { return quota.Charge{Limit: l, Key: key, Cost: 1} }
	ok(t, server.LPush(bg, place(charge(a, "list")), "x").Err())
	ok(t, server.Set(bg, place(charge(b, "text")), "17", 0).Err())
	var calls [][]quota.Charge
	for range 60 {
		calls = append(calls, []quota.Charge{charge(a, "hot")})
	}
	for _, c := range []quota.Charge{charge(b, "hot"), charge(a, "list"), charge(b, "text"), charge(b, "cold")} {
		calls = append(calls, []quota.Charge{c})
	}
	for _, both := range []bool{false, true} {
		if both { // the same with another key in each
			for i, cs := range calls {
				calls[i] = append([]quota.Charge{charge(b, "both")}, cs...)
			}
			server.Del(bg, place(charge(a, "hot")), place(charge(b, "hot")), place(charge(b, "cold")))
		}
		warm := []quota.Charge{charge(a, "other"), charge(b, "other")}
		engine.Together(bg, store, [][]quota.Charge{warm, warm[:1], warm[1:]}) // the server learns the scripts
		server.resetCounts(t)
		got, errs := engine.Together(bg, store, calls)
		sets := 3
		if both {
			sets++
		}
		if n := server.count(t); n["evalsha"].calls != 1 || n["eval"].calls != 0 || n["set"].calls != sets {
			t.Errorf("calls of a batch: got EVALSHA %+v, EVAL %+v, SET %+v; want 1, 0 and %d", n["evalsha"], n["eval"], n["set"], sets)
		}
		for i, cs := range calls {
			last := len(cs) - 1
			key := cs[last].Key
			var want error
			if key == "list" || key == "text" {
				want = quota.ErrMisconfigured
			}
			is(t, fmt.Sprintf("charge %d to %s", i, key), errs[i], want)
			if d := got[i][last]; i < 60 && (d.Allowed != (i < 40) || d.Remaining != max(0, 39-int64(i))) {
				t.Errorf("charge %d to the hot key: got %+v, want allowed=%v, %d left", i, d, i < 40, max(0, 39-i))
			}
		}
		last := len(got[60]) - 1
		if got[60][last].Remaining != 999 || got[63][last].Remaining != 999 || both && got[63][0].Remaining != 1000-42 {
			t.Errorf("the other keys: got %+v, %+v; want 999 left of each, and 958 of the shared one", got[60], got[63])
		}
	}
}

// noScript: a server that is not known to have a script is told the text, once; one that lost it is told again.
func noScript(t *testing.T, l library) {
	server, open := l.single(t)
	store := open(engine.Options{})
	a, b := yearly("a", 1000), limitOf("b", newRule(bucket, 1000, 1, time.Hour))
	unscripted := limitOf("c", hidden{newRule(first, 1000, 1, year)})
	left(t, store, unscripted, "ready") // the store asks the server for its functions
	id := 0
	calls := map[string]func(){
		"single": func() { take(t, store, quota.Charge{Limit: a, Key: "k", Cost: 1}) },
		"list": func() {
			chargeAll(t, store, quota.Charge{Limit: a, Key: "k", Cost: 1}, quota.Charge{Limit: b, Key: "k", Cost: 1})
		},
		"id": func() {
			id++
			take(t, store, quota.Charge{Limit: b, Key: "k", Cost: 1, ID: string(rune('a' + id))})
		},
	}
	for name, call := range calls {
		t.Run(name, func(t *testing.T) {
			for _, lost := range []int{0, 1} {
				ok(t, server.ScriptFlush(bg).Err())
				server.resetCounts(t)
				for range 3 {
					call()
				}
				n := server.count(t)
				if n["evalsha"].calls != 2+lost || n["evalsha"].failed != lost || n["eval"].calls != 1 {
					t.Errorf("three calls: got EVALSHA %+v and EVAL %+v, want %d, of which %d failed, and 1", n["evalsha"], n["eval"], 2+lost, lost)
				}
			}
		})
	}
	t.Run("swap", func(t *testing.T) {
		server.ScriptFlush(bg)
		for i := range int64(3) {
			if d := take(t, store, quota.Charge{Limit: unscripted, Key: "k", Cost: 1}); d.Remaining != 999-i {
				t.Errorf("call %d: got %d left, want %d", i, d.Remaining, 999-i)
			}
		}
	})
}

// scriptFlush makes the servers forget the scripts again and again: no caller may see an error.
func scriptFlush(t *testing.T, l library) {
	t.Parallel()
	eachSite(t, func(t *testing.T, p site) {
		s := l.dial(t, p.direct)
		limit, list := counted(plenty), keys(16)
		done := make(chan struct{})
		var flushes int
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				case <-time.After(3 * time.Millisecond):
				}
				for _, s := range p.servers {
					if _, err := s.Do("SCRIPT", "FLUSH"); err != nil {
						t.Error(err)
					}
				}
				flushes++
			}
		})
		y := calls(s, limit, list, sized(3000, 30_000))
		close(done)
		wg.Wait()
		t.Logf("%d flushes: %v", flushes, y)
		y.only(t)
		y.exact(t, charged(t, s, limit, list...))
		if flushes < 5 {
			t.Errorf("flushes: got %d, want 5 or more", flushes)
		}
	})
}

// liar is a fixed window whose Lua is another.
type liar struct {
	quota.Algorithm
	rule string
	lua  string
}

func (l liar) Spec() quota.Spec {
	s := l.Algorithm.Spec()
	s.Rule = quota.Rule{}
	copy(s.Rule[:], l.rule)
	return s
}

func (l liar) Lua() string { return l.lua }

// cachedScripts: the scripts that a server keeps grow with the rules, and not with the combinations of rules in a call.
func cachedScripts(t *testing.T, l library) {
	server, open := l.single(t)
	store := open(engine.Options{})
	kernel := counted(plenty).Algorithm()
	limits := make([]*quota.Limit, 13)
	for i := range limits {
		name := "own" + strconv.Itoa(i)
		limits[i] = limitOf(name, liar{kernel, name, kernel.(driver.Scripted).Lua()})
	}
	random := testenv.Random(t)
	var all sync.WaitGroup
	for range 16 {
		order := random.Perm(len(limits))
		all.Go(func() {
			for i := range 100 {
				cs := make([]quota.Charge, 1+i%5)
				for j := range cs {
					cs[j] = quota.Charge{Limit: limits[order[(i+j*(1+i%3))%len(limits)]], Key: "k", Cost: 1}
				}
				if err := store.ChargeAll(bg, cs, make([]quota.Decision, len(cs))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	info, err := server.Info(bg, "memory").Result()
	ok(t, err)
	_, rest, _ := strings.Cut(info, "number_of_cached_scripts:")
	kept, err := strconv.Atoi(strings.TrimSpace(strings.SplitN(rest, "\n", 2)[0]))
	ok(t, err)
	t.Logf("%d scripts for %d rules", kept, len(limits))
	if most := 4 * len(limits); kept > most {
		t.Errorf("scripts that the server keeps for %d rules: got %d, want %d or fewer", len(limits), kept, most)
	}
}

// kernels: Lua that decides otherwise than its Go, or fails, is ErrMisconfigured, and ErrIndeterminate too if it
// ran, unless the script says in its own words that it wrote nothing. A list in which it fails is not written.
func kernels(t *testing.T, l library) {
	server, open := l.single(t)
	store := open(engine.Options{})
	window := yearly("w", 10)
	for name, test := range map[string]struct {
		lua    string
		writes bool // it decides, and too late to take back
	}{
		"grants":      {"return true, true, 1000, unit, 1, 1, 0, nil", true},
		"denies":      {"return false, false, 0, u, a, b, c, tail", false},
		"is fresh":    {"return true, false, 0, u, a, b, c, tail", false},
		"forgets":     {"return true, true, 0, 0, 0, 0, 0, nil", true},
		"throws":      {"error('boom')", false},
		"is broken":   {"return return", false},
		"no numbers":  {"return true, true, 1000, unit, 'x', {}, 0, nil", false},
		"no state":    {"return true, true, 1000", false},
		"no time":     {"return true, true, 0/0, unit, 1, 1, 0, nil", false},
		"no end":      {"return true, true, 1/0, unit, 1, 1, 0, nil", false},
		"in the past": {"return true, true, -5000000, unit, 1, 1, 0, nil", false},
		"a global":    {"leak = 1 return true, true, 1000, unit, 1, 1, 0, nil", false},
	} {
		t.Run(name, func(t *testing.T) {
			rule := "r" + string(rune('a'+len(name))) + name[:1]
			c := quota.Charge{Limit: limitOf("liar", liar{window.Algorithm(), rule, test.lua}), Key: "k", Cost: 1}
			good := quota.Charge{Limit: window, Key: "k", Cost: 1}
			if name == "grants" { // no difference unless there is more than fits
				c.Cost = 11
			}
			server.FlushAll(bg)
			alone, list := errUncertain, errUncertain
			switch name {
			case "is broken":
				alone, list = quota.ErrMisconfigured, quota.ErrMisconfigured
			case "forgets": // a state that is not there: no reply tells of the difference
				alone, list = nil, nil
			case "no time", "no end", "in the past":
				list = quota.ErrMisconfigured
			}
			_, err := store.Charge(bg, c)
			is(t, "alone", err, alone)
			if held := server.held(t, c); held != "" && !test.writes {
				t.Errorf("state: got %x, want none", held)
			}
			server.FlushAll(bg)
			if name == "is fresh" {
				return // in a list only the grant counts
			}
			is(t, "in a list", store.ChargeAll(bg, []quota.Charge{good, c}, make([]quota.Decision, 2)), list)
			if held := server.held(t, good); held != "" && !test.writes {
				t.Errorf("state after the list: got %x, want none", held)
			}
		})
	}
}

// replies: whatever a server, or a program that stands before it, answers to a script, the client's side of
// the engine makes an error of the right class of it and never panics.
func replies(t *testing.T, l library) {
	const micros, now = 1795427141791724, ":1795427141791724\r\n"
	stamp := string(binary.BigEndian.AppendUint64(nil, micros)[1:]) // begins the reply to a charge that goes alone
	var answer atomic.Value
	store := l.dial(t, target{addrs: []string{fakeRedis(t, func([]string) string { return answer.Load().(string) })}}).store
	scripted := yearly("a", 10)
	unscripted := limitOf("b", hidden{scripted.Algorithm()})
	one := quota.Charge{Limit: scripted, Key: "k", Cost: 1}
	for i, reply := range []string{
		":5\r\n", "+OK\r\n", "$2\r\nOK\r\n", "$-1\r\n", "_\r\n", "*-1\r\n", "*0\r\n", "*1\r\n" + now, "*2\r\n" + now + now, "*2\r\n$1\r\nx\r\n$-1\r\n",
		"*2\r\n" + now + "*1\r\n$1\r\nx\r\n", "*2\r\n*2\r\n" + now + "$-1\r\n$-1\r\n", "*2\r\n" + now + "$5\r\nhello\r\n", "*3\r\n" + now + "$5\r\nhello\r\n$-1\r\n",
		"*5\r\n" + now + "$-1\r\n$-1\r\n$-1\r\n$-1\r\n", "*2\r\n:0\r\n$-1\r\n", "*3\r\n:0\r\n$-1\r\n$-1\r\n", "*2\r\n:9223372036854775807\r\n$-1\r\n",
		"*2\r\n:-9223372036854775808\r\n$-1\r\n", "*3\r\n:-9223372036854775808\r\n$-1\r\n$-1\r\n", "*2\r\n,1.5\r\n$-1\r\n", "*2\r\n#t\r\n_\r\n", "*2\r\n" + now + "#t\r\n",
		"*2\r\n(3492890328409238509324850943850943825024385\r\n_\r\n", "*2\r\n-ERR inside\r\n" + now, "*2\r\n" + now + "-ERR inside\r\n", "%1\r\n" + now + now, "#f\r\n", ",1.5\r\n",
		"$6\r\n" + stamp[1:] + "\r\n", "$7\r\n\x00\x00\x00\x00\x00\x00\x00\r\n", "$7\r\n\x7f" + stamp[1:] + "\r\n", "$12\r\n" + stamp + "hello\r\n",
		"*2\r\n" + now + "%1\r\n+a\r\n+b\r\n", "-ERR user_script:1: boom\r\n",
	} {
		answer.Store(reply)
		for _, cs := range [][]quota.Charge{
			{one}, {one, {Limit: scripted, Key: "l", Cost: 1}}, {{Limit: scripted, Key: "k", Cost: 1, ID: "r"}}, {{Limit: unscripted, Key: "k", Cost: 1}},
		} {
			out := make([]quota.Decision, len(cs))
			err := store.ChargeAll(bg, cs, out)
			if !errors.Is(err, quota.ErrMisconfigured) && !(cs[0].ID != "" && errors.Is(err, quota.ErrInvalid)) {
				t.Errorf("reply %d, %.40q, to%s:\n got  %+v, %v\n want ErrMisconfigured", i, reply, show(cs...), out, err)
			}
			// A state that is none, and the record of an id, are answers of a script that wrote nothing.
			sound := strings.Contains(reply, "hello") || cs[0].ID != ""
			if got := quota.Charged(err); !sound && cs[0].Limit == scripted && got != quota.ChargeUnknown {
				t.Errorf("reply %d, %.40q, to%s: Charged(%v): got %v, want unknown", i, reply, show(cs...), err, got)
			}
		}
	}
	for reply, want := range map[string]error{
		"OOM full": quota.ErrUnavailable, "LOADING wait": quota.ErrUnavailable, "NOSCRIPT again": quota.ErrUnavailable,
		"NOPERM no": quota.ErrMisconfigured, "WRONGTYPE no": quota.ErrMisconfigured, "FLEETQUOTA no": quota.ErrMisconfigured, "upstream failure": quota.ErrIndeterminate, "": quota.ErrIndeterminate,
		"ERR max number of clients reached":               quota.ErrUnavailable,
		"ERR max number of clients + cluster connections": quota.ErrUnavailable,
		"ERR Error running script (call to f_1): @user_script:9: -OOM command not allowed when used memory > 'maxmemory'.": quota.ErrUnavailable,
		"ERR Error running script (call to f_1): @user_script:9: -READONLY You can't write against a read only replica.":   quota.ErrUnavailable,
		"ERR The user executing the script can't run this command or subcommand script: f1, on @user_script:9.":            quota.ErrMisconfigured,
		"ERR unknown command 'EVALSHA', with args beginning with:":                                                         quota.ErrMisconfigured,
		"UNKILLABLE Sorry the script already executed write commands against the dataset.":                                 quota.ErrIndeterminate,
		"CROSSSLOT Keys in request don't hash to the same slot":                                                            quota.ErrCrossSlot,
	} {
		answer.Store("-" + reply + "\r\n")
		_, err := store.Charge(bg, one)
		is(t, reply, err, want)
	}
	// The answer of a script is a decision here too, or the test would prove little.
	answer.Store("$7\r\n" + stamp + "\r\n")
	if d := take(t, store, one); d.Remaining != 9 {
		t.Errorf("a script's answer: got %+v, want 9 left", d)
	}
}

// maxAllocs is how many allocations a decision may cost beyond the bare client's call of a script.
const maxAllocs = 6

// bareScript does the least that a decision takes: TIME, GET and SET.
const bareScript = `local t = redis.call('TIME')
local v = redis.call('GET', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {t[1] * 1000000 + t[2], v}`

// allocs: a decision allocates at most maxAllocs more than a bare script call through the same client.
func allocs(t *testing.T, l library) {
	if raceEnabled {
		t.Skip("the race detector allocates on its own account")
	}
	server, open := l.single(t)
	store := open(engine.Options{})
	sha, err := server.ScriptLoad(bg, bareScript).Result()
	ok(t, err)
	value := string(make([]byte, 25)) // as long as a bucket's state
	measure := func(f func()) int {
		f()
		least := math.Inf(1)
		for range 20 { // the client's goroutines allocate as well, now and then
			least = min(least, testing.AllocsPerRun(100, f))
		}
		return int(least)
	}
	floor := measure(func() {
		if err := server.conn.evalsha(sha, "bare", value, "60000"); err != nil {
			t.Error(err)
		}
	})
	limit := limitOf("tokens", newRule(bucket, 1<<30, 1<<20, 1_000_000_000))
	for name, c := range map[string]quota.Charge{
		"grant": {Cost: 1}, "grant of 1500": {Cost: 1500}, "denial": {Cost: 1 << 30}, "peek": {Op: quota.OpPeek, Cost: 1},
	} {
		c.Limit, c.Key = limit, "team-7/agent-123"
		n := measure(func() { take(t, store, c) })
		t.Logf("%s: %d allocations, bare %d", name, n, floor)
		if n > floor+maxAllocs {
			t.Errorf("allocations of a %s: got %d, want at most %d, which is %d more than the bare client's", name, n, floor+maxAllocs, maxAllocs)
		}
	}
}

// noClientClock: a process's own clock cannot reach a decision, for calls send no time, whenever they are
// made.
func noClientClock(t *testing.T, l library) {
	t.Parallel()
	var mu sync.Mutex
	var scripts [][]string
	addr := fakeRedis(t, func(args []string) string {
		mu.Lock()
		defer mu.Unlock()
		scripts = append(scripts, args)
		return "*3\r\n:-1\r\n$-1\r\n$-1\r\n" // short of some calls' reply; only the scripts sent count
	})
	sent := func() [][]string {
		s := l.dial(t, target{addrs: []string{addr}, options: engine.Options{Batching: engine.BatchAll}}) // no questions between
		for _, a := range []quota.Algorithm{
			algorithm.TokenBucket(100, 10, time.Second), algorithm.FixedWindow(5, time.Minute),
			algorithm.SlidingWindow(5, time.Minute), algorithm.SlidingWindowLog(5, time.Minute),
			hidden{algorithm.FixedWindow(5, time.Minute)},
		} {
			limit := limitOf("l", a)
			for op := quota.OpTake; op <= quota.OpReset; op++ {
				s.Charge(bg, quota.Charge{Limit: limit, Key: "k", Cost: 1, Op: op})
				s.Charge(bg, quota.Charge{Limit: limit, Key: "k", Cost: 1, Op: op, ID: "id"})
			}
		}
		mu.Lock()
		defer mu.Unlock()
		list := scripts
		scripts = nil
		return list
	}
	first := sent()
	time.Sleep(5 * time.Millisecond)
	second := sent()
	if len(first) < 40 || len(first) != len(second) {
		t.Fatalf("scripts sent: got %d and %d, want 40 or more, as many each time", len(first), len(second))
	}
	for i := range first {
		for j, a := range first[i] {
			if a != second[i][j] {
				t.Errorf("argument %d of a call: got %q a moment later, want %q", j, second[i][j], a)
			}
			n, _ := strconv.ParseFloat(a, 64)
			for _, unit := range []float64{1, 1e3, 1e6, 1e9} {
				if now := float64(time.Now().UnixNano()) / unit; n > 0.9*now && n < 1.1*now {
					t.Errorf("argument %d: got %s, which may be a time; want none", j, a)
				}
			}
		}
	}
}
