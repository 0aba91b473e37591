package conformance

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var sizeCases = []testCase{
	{rule: s1, name: "largest states", needs: []Feature{Exact}, provisional: "1.1", run: largestStates},
	{rule: s2, name: "every length", needs: []Feature{Exact}, provisional: "1.1", run: everyLength},
	{rule: c1, name: "largest keys", needs: []Feature{Exact}, provisional: "1.1", run: largestKeys},
	{rule: c1, name: "thousands", needs: []Feature{Exact}, provisional: "1.1", run: thousandsOfKeys},
}

// bulky is an algorithm whose states have a list of a given length, of the numbers that have the longest texts. A take charges,
// and a debit sets the length. The verdict shows if the store did not keep all.
type bulky struct{}

func (bulky) Spec() quota.Spec {
	return quota.Spec{Rule: quota.Rule{'b', 'u', 'l', 'k', '-', 'y', '-', '1'}, Unit: quota.MaxNumber, Capacity: 1 << 40}
}

func (b bulky) Decide(s quota.State, r quota.Request, _ quota.Micros) (quota.State, quota.Verdict) {
	used, length := int64(0), 0
	if !s.IsZero() {
		used, length = s.C+quota.MaxNumber, len(s.Tail)
		sound := s.Unit == quota.MaxNumber && s.A == -quota.MaxNumber && s.B == quota.MaxNumber-int64(length)
		for i, n := range s.Tail {
			sound = sound && n == b.number(i, used)
		}
		if !sound {
			return s, quota.Verdict{Remaining: math.MinInt64} // the store did not keep the numbers
		}
	}
	v := quota.Verdict{Outcome: quota.Outcome{Allowed: true}, ResetAfter: quota.Forever}
	switch r.Op {
	case quota.OpTake, quota.OpPeek:
		switch {
		case r.Cost > 1<<40-used:
			v.Allowed, v.RetryAfter = false, quota.Forever
		case r.Op == quota.OpTake:
			used += r.Cost
			v.Write = r.Cost > 0
		}
	case quota.OpDebit:
		length = int(min(r.Cost, quota.MaxTail))
		v.Write = true
	case quota.OpReset:
		v.Write, used = !s.IsZero(), 0
		s = quota.State{}
	}
	if v.Write && r.Op != quota.OpReset {
		s = quota.State{Unit: quota.MaxNumber, A: -quota.MaxNumber, B: quota.MaxNumber - int64(length), C: used - quota.MaxNumber, Tail: make([]int64, length)}
		for i := range s.Tail {
			s.Tail[i] = b.number(i, used)
		}
	}
	if v.Remaining = 1<<40 - used; s.IsZero() {
		v.ResetAfter = 0
	}
	return s, v
}

// Share returns the rule itself: no fallback decides on it in the store's place.
func (b bulky) Share(int64) (quota.Algorithm, error) { return b, nil }

func (bulky) number(i int, used int64) int64 { return -(quota.MaxNumber - int64(i) - used) }

// longestName is the longest name of a limit.
var longestName = strings.Repeat("n", 64)

// largestStates has states grow to the longest list of the longest numbers, under the longest name and key, and shrink again.
func largestStates(t *trial) {
	l := quota.NewLimit(longestName, bulky{})
	key := "g/" + strings.Repeat("%", quota.MaxKey-2)
	lists := driver.AtomicityOf(t.open(Opening{}).store) != driver.OneKey
	var trace []step
	add := func(cs ...quota.Charge) {
		s := step{id: 1 + len(trace), other: t.rng.IntN(2) == 0, list: t.rng.IntN(2) == 0}
		for _, c := range cs {
			c.Limit = l
			s.charges = append(s.charges, charge{Charge: c})
		}
		trace = append(trace, s)
	}
	for _, n := range []int64{1, quota.MaxTail, 15, 16, 17, 127, 129, 254, 256, 1000, 1024, 2049, 4095, 4097, quota.MaxTail - 1, quota.MaxTail, 0, quota.MaxTail} {
		add(quota.Charge{Key: key, Op: quota.OpDebit, Cost: n})
		add(quota.Charge{Key: key, Op: quota.OpTake, Cost: 3})
		add(quota.Charge{Key: key, Op: quota.OpPeek})
	}
	if lists {
		var long, takes []quota.Charge
		for i := range 4 {
			c := quota.Charge{Key: fmt.Sprint("g/", i), Op: quota.OpDebit, Cost: quota.MaxTail}
			long, takes = append(long, c), append(takes, quota.Charge{Key: c.Key, Cost: int64(1 + i)})
		}
		add(long...)
		add(takes...)
		takes[3].Cost = 1 << 41 // denied
		add(takes...)
		for i := range takes {
			takes[i].Op, takes[i].Cost = quota.OpPeek, 0
		}
		add(takes...)
	}
	add(quota.Charge{Key: key, Op: quota.OpReset})
	add(quota.Charge{Key: key, Op: quota.OpPeek})
	t.perform(trace)
}

// everyLength makes lists of every length, granted and denied, from several goroutines at the same time. Each goroutine has
// keys of its own, so that every answer is known.
func everyLength(t *trial) {
	needLists(t)
	const callers = 6
	const capacity = 1 << 20
	l := t.named("tokens", goOnly, numbers{limit: capacity})
	hs := t.handles(t.root, callers)
	t.together(callers, func(i int) {
		rng := t.suite.random(fmt.Sprint(t.of.path(), i))
		used := map[string]int64{}
		play := func(id string, cs []quota.Charge, granted bool) bool {
			want := make([]quota.Decision, len(cs))
			for j := range cs {
				c := &cs[j]
				c.Limit, c.ID = l, id
				d := quota.Decision{Allowed: true, Capacity: capacity}
				switch {
				case c.Cost > capacity-used[c.Key]:
					d.Allowed, d.RetryAfter = false, quota.Never
				case granted && c.Op == quota.OpTake:
					d.Charged = c.Cost
					used[c.Key] += c.Cost
				}
				if d.Remaining = capacity - used[c.Key]; used[c.Key] > 0 {
					d.ResetAfter = quota.Never
				}
				want[j] = d
			}
			got, unknown := t.persist(hs[i], true, cs...)
			if unknown {
				return false
			}
			for j := range got {
				if want[j].At = got[0].At; got[j] != want[j] {
					t.fatalf("a list of %d charges, while %d other goroutines make lists on keys of their own; charge %d,%s:\n%s\n%s",
						len(cs), callers-1, j+1, show(cs[j:j+1]), answer(got[j:j+1], nil), expectation(want[j:j+1]))
				}
			}
			return true
		}
		for round, n := range rng.Perm(quota.MaxCharges) {
			id := ""
			if round%4 == 0 && !t.lacks(IDs) {
				id = fmt.Sprintf("r%d.%d", i, n)
			}
			cs := make([]quota.Charge, n+1)
			for j, k := range rng.Perm(quota.MaxCharges)[:n+1] {
				cs[j] = quota.Charge{Key: fmt.Sprintf("g%d/%d", i, k), Cost: 1 + rng.Int64N(9)}
			}
			granted := rng.IntN(3) > 0
			if !granted {
				cs[rng.IntN(len(cs))].Cost = capacity + 1
			}
			if !play(id, cs, granted) {
				return
			}
			for j := range cs {
				cs[j].Op, cs[j].Cost = quota.OpPeek, 0
			}
			if !play("", cs, true) {
				return
			}
		}
	})
}

// largestKeys charges the longest list of the longest keys, of characters that stores escape, under the longest name and id.
// The keys differ in one character.
func largestKeys(t *trial) {
	l := t.named(longestName, goOnly, numbers{limit: 1000})
	lists := driver.AtomicityOf(t.open(Opening{}).store) != driver.OneKey
	var trace []step
	characters := []string{"%", "{", "}", ":", " ", "\x01", "'", "\\", "\"", "é", "\U0010ffff", "k"}
	for n, c := range characters[:t.suite.part(len(characters))] {
		group := strings.Repeat(c, 200/len(c))
		rest := strings.Repeat(c, (quota.MaxKey-len(group)-1-2)/len(c))
		id := ""
		if !t.lacks(IDs) {
			id = strings.Repeat(c, 126/len(c)) + fmt.Sprintf("%02d", n)
		}
		for pass := range 3 {
			s := step{other: pass > 0}
			for i := range quota.MaxCharges {
				key := group + "/" + rest + fmt.Sprintf("%02d", i)
				if i%2 == 0 {
					key = group + "/" + fmt.Sprintf("%02d", i) + rest
				}
				cost, op := int64(1+(i+7*n)%97), quota.OpTake
				if pass == 2 {
					cost, op = 0, quota.OpPeek
				}
				s.charges = append(s.charges, charge{Charge: quota.Charge{Limit: l, Key: key, Cost: cost, Op: op}})
				if pass < 2 && (lists || pass == 0) {
					s.charges[len(s.charges)-1].ID = id
				}
			}
			if lists {
				s.id = 1 + len(trace)
				trace = append(trace, s)
				continue
			}
			for _, c := range s.charges {
				c.ID = ""
				trace = append(trace, step{id: 1 + len(trace), other: s.other, charges: []charge{c}})
			}
		}
	}
	for i, c := range []string{"%", "{"} { // the longest group and id
		for range 2 {
			s := step{id: 1 + len(trace), charges: []charge{{Charge: quota.Charge{Limit: l, Key: strings.Repeat(c, quota.MaxKey), Cost: int64(1 + i)}}}}
			if !t.lacks(IDs) {
				s.charges[0].ID = strings.Repeat(c, 128)
			}
			trace = append(trace, s)
		}
	}
	t.perform(trace)
}

// thousandsOfKeys charges as many keys as a few seconds allow, up to some thousands, and looks at each afterwards: some keys of
// one group, in lists, and others of groups of their own.
func thousandsOfKeys(t *trial) {
	const callers, each = 6, 20
	l := t.named("tokens", goOnly, numbers{limit: 1000})
	hs := t.handles(t.root, callers)
	long := quota.MaxCharges
	if driver.AtomicityOf(hs[0].store) == driver.OneKey {
		long = 1
	}
	cost := func(n int) int64 { return int64(1 + n%89) }
	var mu sync.Mutex
	charged := map[string]int64{}
	take := func(h *handle, cs []quota.Charge) {
		if ds, unknown := t.persist(h, len(cs) > 1, cs...); !unknown {
			mu.Lock()
			defer mu.Unlock()
			for i, c := range cs {
				if !ds[i].Allowed || ds[i].Remaining != 1000-c.Cost {
					t.fatalf("take%s, a fresh key after %d others:\n%s\n\twant allowed, remaining %d", show(cs[i:i+1]), len(charged), answer(ds[i:i+1], nil), 1000-c.Cost)
				}
				charged[c.Key] = c.Cost
			}
		}
	}
	end := time.Now().Add(3 * time.Second)
	t.together(callers, func(i int) {
		rng := t.suite.random(fmt.Sprint(t.of.path(), i))
		for n := range t.suite.sized(t.suite.part(each)) {
			if n > 1 && time.Now().After(end) {
				return
			}
			var cs []quota.Charge
			for j := range long {
				cs = append(cs, quota.Charge{Limit: l, Key: fmt.Sprintf("g%d/%d.%d", i, n, j), Cost: cost(n + j)})
			}
			take(hs[i], cs)
			for j := range 32 {
				take(hs[i], []quota.Charge{{Limit: l, Key: "u" + strconv.FormatUint(rng.Uint64(), 36), Cost: cost(n + j)}})
			}
		}
	})
	keys := make([]string, 0, len(charged))
	for key := range charged {
		keys = append(keys, key)
	}
	t.together(callers, func(i int) {
		for n := i; n < len(keys); n += callers {
			// A handle other than the one that charged, as a rule.
			if got := t.used(hs[(i+n)%callers], l, keys[n]); got != charged[keys[n]] {
				t.fatalf("%q, a key of %d that were charged before any was looked at:\n\tgot  %d tokens charged\n\twant %d", keys[n], len(keys), got, charged[keys[n]])
			}
		}
	})
}
