package clienttest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// packed returns the bytes that the server must hold for an item: the length and name of the rule, then seven
// bytes a number, the highest first: the unit, A, B and, unless all are zero, C and the tail. It is written
// down here a second time, so that no change of the engine alters bytes that other releases have stored.
func packed(it *driver.Item) string {
	s := &it.State
	if s.IsZero() {
		return ""
	}
	numbers := []int64{s.Unit, s.A, s.B}
	if s.C != 0 || len(s.Tail) > 0 {
		numbers = append(append(numbers, s.C), s.Tail...)
	}
	name := it.Rule.String()
	text := []byte{byte(len(name))}
	text = append(text, name...)
	for _, n := range numbers {
		for shift := 48; shift >= 0; shift -= 8 {
			text = append(text, byte(n>>shift))
		}
	}
	return string(text)
}

// readmeKey is the key that the documentation of Redis shows.
const readmeKey = "quota:{team-7}/agent-123:tokens"

// key: the key that the documentation shows is the key.
func key(t *testing.T, l library) {
	server, open := l.single(t)
	take(t, open(engine.Options{}), quota.Charge{Limit: limitOf("tokens", newRule(bucket, 10, 1, time.Hour)), Key: "team-7/agent-123", Cost: 1})
	if got := server.Keys(bg, "*").Val(); len(got) != 1 || got[0] != readmeKey {
		t.Errorf("keys: got %q, want %q only", got, readmeKey)
	}
}

// expiry: a key lives as long as its state means something and at most the slack longer, a key made fresh is
// gone at once, and denials and peeks leave a key and its lifetime alone.
func expiry(t *testing.T, l library) {
	server, open := l.single(t)
	store := open(engine.Options{})
	for k := range kinds {
		for _, hide := range []bool{false, true} {
			name := kindNames[k]
			if hide {
				name += "-cas"
			}
			limit := func(name string, n, refill int64, period time.Duration) *quota.Limit {
				a := newRule(k, n, refill, period)
				if hide {
					a = hidden{a}
				}
				return limitOf(name, a)
			}
			t.Run(name, func(t *testing.T) {
				lifetimes(t, server, store, name, limit)
				traceless(t, server, store, name, limit)
			})
		}
	}
}

func lifetimes(t *testing.T, server *data, store store, name string, limit func(string, int64, int64, time.Duration) *quota.Limit) {
	rng := rand.New(rand.NewPCG(seed(t), 0))
	periods := []time.Duration{time.Microsecond, 999 * time.Microsecond, time.Second, time.Hour, 9 * year}
	for i := range 200 {
		period := periods[rng.IntN(len(periods))]
		n := magnitude(rng, 3)
		c := quota.Charge{Limit: limit(name, n, n, period), Key: string(rune('a' + rng.IntN(20))), Cost: 1 + rng.Int64N(n), Op: quota.Op(rng.IntN(2) * int(quota.OpDebit))}
		was := server.held(t, c)
		d := take(t, store, c)
		if d.Charged == 0 || server.held(t, c) == was {
			continue // not granted, or in debt as deep as can be: not written
		}
		// The server reads its clock for SET after it did for the script, so at is never too early, and PTTL
		// never too late.
		at := server.expires(t, place(c))
		left := server.PTTL(bg, place(c)).Val()
		if at < 0 && time.Since(d.At.Time()) > d.ResetAfter+driver.ExpirySlack {
			continue // gone by rights; the machine is slow
		}
		if earliest := int64(d.At) + d.ResetAfter.Microseconds() + driver.ExpirySlack.Microseconds() - 1000; at*1000 < earliest {
			t.Errorf("step %d: end of the key: got %d ms, want %d µs or later", i, at, earliest)
		}
		most := d.ResetAfter + driver.ExpirySlack + time.Millisecond
		if strings.HasSuffix(name, "cas") {
			most += time.Second // a lifetime begins with the swap, a round trip after the decision
		}
		if left > most {
			t.Errorf("step %d: PTTL: got %v, want at most %v", i, left, most)
		}
	}
}

func traceless(t *testing.T, server *data, store store, name string, limit func(string, int64, int64, time.Duration) *quota.Limit) {
	l := limit(name+".t", 10, 1, year)
	c := quota.Charge{Limit: l, Key: "k", Cost: 3}
	other := quota.Charge{Limit: l, Key: "other", Cost: 1}
	first := take(t, store, c)
	key, was, until := place(c), server.held(t, c), server.expires(t, place(c))
	unchanged := func(after string) {
		t.Helper()
		if now := server.held(t, c); now != was {
			t.Errorf("state after %s: got %x, want %x", after, now, was)
		}
		if now := server.expires(t, key); now != until {
			t.Errorf("end of the key after %s: got %d, want %d", after, now, until)
		}
		if now := server.held(t, other); now != "" {
			t.Errorf("state of a key that was charged nothing, after %s: got %x, want none", after, now)
		}
	}
	for _, q := range []quota.Charge{{Cost: 8}, {Cost: 11}, {Cost: 1 << 62}, {Cost: 0}, {Op: quota.OpPeek, Cost: 1}, {Op: quota.OpPeek, Cost: 8}, {Op: quota.OpRefund, Cost: 3, MadeAt: 1}, {Op: quota.OpDebit}} {
		q.Limit, q.Key = l, "k"
		take(t, store, q)
		unchanged(show(q))
	}
	denied := c
	denied.Cost = 8
	for _, list := range [][]quota.Charge{{denied, other}, {other, denied}} {
		chargeAll(t, store, list...)
		unchanged("a denied list")
	}
	for _, whole := range []quota.Charge{c.Refund(first, 3), {Limit: l, Key: "k", Op: quota.OpReset}} {
		take(t, store, whole)
		if now := server.held(t, c); now != "" {
			t.Errorf("state after a %s to whole: got %x, want none", whole.Op, now)
		}
		take(t, store, c)
	}
}

// foreign: bytes that the store did not write are ErrMisconfigured, and the store leaves them alone: another
// program's value, a newer layout, a state that is cut off or out of range. A state of another rule is C8 of
// package conformance.
func foreign(t *testing.T, l library) {
	server, open := l.single(t)
	good := func(rule string, numbers ...int64) string {
		it := driver.Item{State: quota.State{Unit: numbers[0], A: numbers[1], B: numbers[2], Tail: numbers[3:]}}
		copy(it.Rule[:], rule)
		return packed(&it)
	}
	own := good("fw1", year.Microseconds(), 1, 1)
	values := map[string]string{
		"text":         "17",
		"json":         `{"tokens":1000}`,
		"byte":         "\x03",
		"zeros":        strings.Repeat("\x00", 25),
		"no name":      "\x00" + own[1:],
		"long name":    "\x09" + own[1:],
		"newer layout": good("fw2", year.Microseconds(), 1, 1),
		"longer name":  good("fw10", year.Microseconds(), 1, 1),
		"record":       "id1:00:1:2:3",
		"name only":    own[:4],
		"half a unit":  own[:8],
		"no numbers":   own[:11],
		"one number":   own[:18],
		"cut":          own[:24],
		"one byte":     own + "\x00",
		"unit 0":       own[:4] + strings.Repeat("\x00", 7) + own[11:],
		"huge unit":    own[:4] + "\x7f" + strings.Repeat("\xff", 6) + own[11:],
		"huge A":       own[:11] + "\x20\x00\x00\x00\x00\x00\x01" + own[18:],
		"huge B":       own[:18] + "\x7f" + strings.Repeat("\xff", 6),
		"huge C":       own + "\x7f" + strings.Repeat("\xff", 6),
		"huge tail":    own + strings.Repeat("\x00", 7) + "\x7f" + strings.Repeat("\xff", 6),
		"long tail":    own + strings.Repeat("\x00", 7*(2+quota.MaxTail)),
		"list":         "",
	}
	fresh := quota.Charge{Limit: yearly("fresh", 10), Key: "k", Cost: 1}
	for _, hide := range []bool{false, true} {
		store, limit := open(engine.Options{}), yearly("n", 10)
		if hide {
			limit = limitOf("n", hidden{limit.Algorithm()})
		}
		c := quota.Charge{Limit: limit, Key: "k", Cost: 1}
		for name, value := range values {
			t.Run(fmt.Sprintf("%s, hidden=%v", name, hide), func(t *testing.T) {
				server.FlushAll(bg)
				if name == "list" {
					ok(t, server.LPush(bg, place(c), "x").Err())
				} else {
					ok(t, server.Set(bg, place(c), value, 0).Err())
				}
				dump := server.Dump(bg, place(c)).Val()
				for _, op := range []quota.Op{quota.OpTake, quota.OpPeek, quota.OpDebit, quota.OpRefund, quota.OpReset} {
					c.Op = op
					_, err := store.Charge(bg, c)
					is(t, op.String(), err, quota.ErrMisconfigured)
					for _, list := range [][]quota.Charge{{c, fresh}, {fresh, c}} {
						is(t, "a list with "+op.String(), store.ChargeAll(bg, list, make([]quota.Decision, 2)), quota.ErrMisconfigured)
					}
					if now := server.Dump(bg, place(c)).Val(); now != dump || server.held(t, fresh) != "" {
						t.Fatalf("after %s: got value %x and a fresh state %x, want %x and none", op, now, server.held(t, fresh), dump)
					}
				}
			})
		}
	}
}

// keysOf: whatever a key is, it is refused or has a quota of its own, in a list of any groups.
func keysOf(t *testing.T, l library) {
	server, open := l.single(t)
	t.Run("hostile", func(t *testing.T) { hostileKeys(t, open(engine.Options{})) })
	t.Run("strict", func(t *testing.T) { strict(t, server, open(engine.Options{Strict: true})) })
	t.Run("any keys", func(t *testing.T) {
		store := open(engine.Options{})
		if got := store.Atomicity(); got != driver.AnyKeys {
			t.Errorf("Atomicity: got %v, want %v", got, driver.AnyKeys)
		}
		for _, a := range []quota.Algorithm{yearly("x", 10).Algorithm(), hidden{newRule(first, 10, 1, year)}} {
			if ds := chargeAll(t, store, spread(limitOf("any."+a.Spec().Rule.String(), a), "any", 6)...); !quota.Granted(ds) || ds[0].Split {
				t.Errorf("a list of several groups: got %+v, want it granted and not split", ds)
			}
		}
	})
}

func hostileKeys(t *testing.T, store store) {
	refused := []string{"", "/", "a/", "/a", "a//b", "\xff", "a\xc3", "a/\xed\xa0\x80", strings.Repeat("k", 513), strings.Repeat("k", 10_000)}
	accepted := []string{"}", "{", "a{b}", "{a}b", "{{a}}", "a:b", "a:b:c", ":", "%", "%7D", "%257D", "a%2Fb", "\x00", "a\x00b", "\x00/\x00", "a\r\nGET x\r\n", "#", "a#r",
		" ", "\x7f", "é", "日本/語", "KEYS[1]", "']]..redis.call('FLUSHALL')--", strings.Repeat("}", 512), strings.Repeat("k", 512), "a/}", "a/{b}", "}/a", "a{/b}"}
	for a := byte('!'); a <= '~'; a++ {
		for b := byte('!'); b <= '~'; b++ {
			if key := string([]byte{a, b}); a == '/' || b == '/' {
				refused = append(refused, key)
			} else {
				accepted = append(accepted, key)
			}
		}
	}
	a, b := yearly("hostile.a", 1000), yearly("hostile.b", 1000)
	limiter := quota.Must(quota.NewLimiter(store, a, nil))
	for _, key := range refused {
		_, err := limiter.Take(bg, key, 1)
		is(t, fmt.Sprintf("%.40q", key), err, quota.ErrInvalid)
		_, err = limiter.ChargeAll(bg, quota.Charge{Key: key, Cost: 1}, quota.Charge{Key: "ok", Cost: 1})
		is(t, fmt.Sprintf("%.40q in a list", key), err, quota.ErrInvalid)
	}
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for i := g; i < len(accepted); i += 16 {
				key := accepted[i]
				if len(key) > 500 { // alone: a sub-key would be too long
					if d, err := limiter.Take(bg, key, 1); err != nil || d.Remaining != 999 {
						t.Errorf("%.40q: got %+v, %v; want 999 left", key, d, err)
					}
					continue
				}
				r, err := limiter.ChargeAll(bg, quota.Charge{Key: key, Cost: 1, ID: key}, quota.Charge{Key: key, Limit: b, Cost: 2, ID: key}, quota.Charge{Key: key + "/sub/}{", Limit: b, Cost: 3, ID: key})
				if err != nil || !r.Granted {
					t.Errorf("%q: got %+v, %v; want a grant", key, r, err)
					continue
				}
				for j, d := range r.Decisions {
					if want := 1000 - int64(j+1); d.Split || d.Replayed || d.Remaining != want {
						t.Errorf("%q, charge %d: got %+v, want %d left, in one slot", key, j, d, want)
					}
				}
			}
		})
	}
	wg.Wait()
}

// prefixes keep stores apart, in states and in records of ids, and bad ones are refused.
func prefixes(t *testing.T, l library) {
	server, open := l.single(t)
	c := quota.Charge{Limit: yearly("p", 10), Key: "k", Cost: 1}
	for prefix, key := range map[string]string{"": "quota:{k}:p", "app:": "app:{k}:p", "x": "x{k}:p", strings.Repeat("~", 64): strings.Repeat("~", 64) + "{k}:p"} {
		store := open(engine.Options{Prefix: prefix})
		if d := take(t, store, c); d.Remaining != 9 {
			t.Errorf("prefix %q: got %d left of a quota of its own, want 9", prefix, d.Remaining)
		}
		if server.Exists(bg, key).Val() != 1 {
			t.Errorf("prefix %q: got keys %q, want %q", prefix, server.Keys(bg, "*").Val(), key)
		}
		h := c
		h.Limit = limitOf("p", hidden{c.Limit.Algorithm()})
		other := open(engine.Options{Prefix: prefix})
		if d := take(t, other, h); d.Remaining != 8 {
			t.Errorf("prefix %q: got %d left by compare-and-swap, want 8, on the same key", prefix, d.Remaining)
		}
		h.ID = "r"
		take(t, other, h)
		if record := strings.TrimSuffix(key, ":p") + "#r"; server.Exists(bg, record).Val() != 1 {
			t.Errorf("prefix %q: got keys %q, want the record %q", prefix, server.Keys(bg, "*").Val(), record)
		}
	}
	for _, prefix := range []string{" ", "a b", "{", "}", "a{b}", "\n", "\x00", "\x7f", "é", strings.Repeat("p", 65)} {
		_, err := server.conn.open(engine.Options{Prefix: prefix})
		if !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), "Options.Prefix") {
			t.Errorf("prefix %q: got %v, want ErrInvalid that names Options.Prefix", prefix, err)
		}
	}
}

// records: the record of a request id has a key of its own in the group's slot, lives for quota.IDWindow, is
// there for grants only, and is refused where it is damaged, whether scripts or compare-and-swap decide. That
// an id is granted once and repeated faithfully is C3 of package conformance.
func records(t *testing.T, l library) {
	server, open := l.single(t)
	for _, hide := range []bool{false, true} {
		t.Run(fmt.Sprintf("hidden=%v", hide), func(t *testing.T) {
			server.FlushAll(bg)
			store := open(engine.Options{})
			limit := func(n int64) *quota.Limit {
				if l := yearly("a", n); !hide {
					return l
				} else {
					return limitOf("a", hidden{l.Algorithm()})
				}
			}
			t.Run("lifetime", func(t *testing.T) { recordLifetime(t, server, store, limit(10)) })
			t.Run("numbers change", func(t *testing.T) { recordOfOtherNumbers(t, store, limit(10), limit(1)) })
			t.Run("none", func(t *testing.T) { noRecord(t, server, store, limit(10)) })
			t.Run("broken", func(t *testing.T) { brokenRecord(t, server, store, limit(10), hide) })
		})
	}
}

func recordLifetime(t *testing.T, server *data, store store, l *quota.Limit) {
	const record = "quota:{once}#r%7B1%7D%20%3A%25"
	take(t, store, quota.Charge{Limit: l, Key: "once", Cost: 3, ID: "r{1} :%"})
	if got := server.PTTL(bg, record).Val(); got > quota.IDWindow+time.Millisecond || got < quota.IDWindow-10*time.Second {
		t.Errorf("lifetime of %s: got %v, want %v", record, got, quota.IDWindow)
	}
}

// recordOfOtherNumbers: the limit's numbers change; that the charge was granted does not.
func recordOfOtherNumbers(t *testing.T, store store, l, smaller *quota.Limit) {
	c := quota.Charge{Limit: l, Key: "numbers", Cost: 3, ID: "r"}
	take(t, store, c)
	c.Limit = smaller
	if d := take(t, store, c); !d.Allowed || !d.Replayed || d.Charged != 3 || d.RetryAfter != 0 {
		t.Errorf("repeated under other numbers: got %+v, want the grant of 3", d)
	}
	// A take ahead that other numbers would not grant was delayed by no more than it accepted.
	fast, slow := algorithm.TokenBucket(10, 10, time.Minute), algorithm.TokenBucket(10, 1, time.Minute)
	ahead := quota.Charge{Limit: limitOf(l.Name()+".ahead", fast), Key: "numbers", Cost: 9, Op: quota.OpAhead, Within: time.Minute, ID: "r2"}
	take(t, store, quota.Charge{Limit: ahead.Limit, Key: ahead.Key, Cost: 10})
	first := take(t, store, ahead)
	again := take(t, store, ahead)
	first.Replayed = true
	if again != first || first.Delay < 50*time.Second || first.Delay > 54*time.Second {
		t.Errorf("a repeated take ahead: got %+v, want as the first time, %+v, delayed by some 54s", again, first)
	}
	ahead.Limit = limitOf(l.Name()+".ahead", slow)
	if d := take(t, store, ahead); !d.Allowed || !d.Replayed || d.Charged != 9 || d.RetryAfter != 0 || d.Delay < first.Delay || d.Delay > time.Minute {
		t.Errorf("a take ahead repeated under other numbers: got %+v, want the grant of 9, delayed by %v to 1m", d, first.Delay)
	}
}

func noRecord(t *testing.T, server *data, store store, l *quota.Limit) {
	take(t, store, quota.Charge{Limit: l, Key: "none", Cost: 5})
	denied, peek := quota.Charge{Limit: l, Key: "none", Cost: 8, ID: "r"}, quota.Charge{Limit: l, Key: "none", Op: quota.OpPeek, Cost: 1, ID: "r"}
	for _, list := range [][]quota.Charge{{denied}, {peek}, {denied, {Limit: l, Key: "none/k", Cost: 1, ID: "r"}}} {
		chargeAll(t, store, list...)
		take(t, store, list[0])
		if server.Exists(bg, "quota:{none}#r").Val() != 0 {
			t.Errorf("after%s: got a record, want none", show(list...))
		}
	}
}

func brokenRecord(t *testing.T, server *data, store store, l *quota.Limit, hide bool) {
	const key = "quota:{broken}#r"
	c := quota.Charge{Limit: l, Key: "broken", Cost: 1, ID: "r"}
	take(t, store, c)
	record := server.Get(bg, key).Val()
	was := server.held(t, c)
	for n := 1; n < len(record); n++ {
		server.Set(bg, key, record[:n], 0)
		_, err := store.Charge(bg, c)
		if !hide && !errors.Is(err, quota.ErrMisconfigured) && !errors.Is(err, quota.ErrInvalid) { // text may be cut behind any digit
			t.Errorf("a record cut at %d of %d: got %v, want ErrMisconfigured or ErrInvalid", n, len(record), err)
		}
		if now := server.held(t, c); now != was {
			t.Fatalf("a record cut at %d: got state %x, want %x", n, now, was)
		}
	}
	server.Del(bg, key)
	server.LPush(bg, key, "x")
	_, err := store.Charge(bg, c)
	is(t, "a record of another type", err, quota.ErrMisconfigured)
	if now := server.held(t, c); now != was {
		t.Errorf("a record of another type: got state %x, want %x", now, was)
	}
}
