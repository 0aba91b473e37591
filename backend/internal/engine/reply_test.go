package engine

import (
	"errors"
	"fmt"
	"math"
	"testing"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Every reply to a script is a decision or an error of the right class, and never a panic.
func TestHostileReplies(t *testing.T) {
	const now = int64(1_795_427_141_791_724)
	state := pack(&driver.Item{Rule: quota.Rule{'f', 'w', '1'}, State: quota.State{Unit: 1, A: 1, B: 1}})
	table := []elements{
		nil, {}, {nil}, {""}, {"OK"}, {now}, {-now}, {nil, nil}, {"x", nil}, {state, now}, {now, now}, {now, int64(0)}, {now, "x"},
		{now, []any{now}}, {[]any{now}, nil}, {now, true}, {now, 1.5}, {1.5, nil}, {now, errors.New("ERR")}, {errors.New("ERR"), nil},
		{now, nil, nil, nil, nil, nil}, {now, state, state, state, state},
		{int64(0), nil}, {int64(0), nil, nil}, {int64(math.MaxInt64), nil}, {int64(math.MinInt64), nil}, {int64(math.MaxInt64), nil, nil}, {int64(math.MinInt64), nil, nil},
		{int64(1<<53 + 1), nil}, {int64(-1<<53 - 1), nil, nil}, {now, "\x00"}, {now, string(make([]byte, 1<<20))}, {now, state[:len(state)-1]}, {now, state + "x"},
		{now, "\xff" + state[1:]}, {now, pack(&driver.Item{Rule: quota.Rule{'t', 'b', '1'}, State: quota.State{Unit: 1}})},
		{-now, nil}, {-now, nil, nil}, // a grant on fresh states, said to be none
	}
	for i, r := range table {
		_, held := r.Text(1)
		hostile(t, fmt.Sprintf("reply %d: %.60q", i, []any(r)), r, true, held)
	}
	for i, r := range []Bulk{
		"", "x", singleReply(now, "")[:numberSize-1], singleReply(0, ""), singleReply(1<<53+1, ""), singleReply(-1<<53-1, ""), singleReply(-1<<55, ""),
		singleReply(now, "\x00"), singleReply(now, string(make([]byte, 1<<20))), singleReply(now, state[:len(state)-1]), singleReply(now, state+"x"),
		singleReply(now, "\xff"+state[1:]), singleReply(now, pack(&driver.Item{Rule: quota.Rule{'t', 'b', '1'}, State: quota.State{Unit: 1}})),
		singleReply(-now, ""), // a grant on a fresh state, said to be none
	} {
		hostile(t, fmt.Sprintf("bulk reply %d: %.60q", i, string(r)), r, true, i >= 7)
	}

	rng := random(t)
	pick := func(depth int) any { return nil }
	pick = func(depth int) any {
		switch n := rng.IntN(12); {
		case n < 2:
			return []int64{now, -now, 0, 1, -1, 1 << 53, math.MaxInt64, math.MinInt64}[rng.IntN(8)]
		case n < 4:
			return nil
		case n < 6:
			b := []byte(state)
			for range rng.IntN(3) {
				b[rng.IntN(len(b))] = byte(rng.Uint32())
			}
			return string(b[:rng.IntN(len(b)+1)])
		case n == 6:
			return state
		case n == 7:
			return rng.Uint64()
		case n == 8 && depth < 3:
			return []any{pick(depth + 1), pick(depth + 1)}
		case n == 9:
			return 1.5
		case n == 10:
			return "id1:" + state
		default:
			return now
		}
	}
	for i := range 20_000 {
		r := make(elements, rng.IntN(5))
		for i := range r {
			r[i] = pick(0)
		}
		hostile(t, fmt.Sprintf("%q", []any(r)), r, false, false)
		if i%4 > 0 { // one kind of call takes a bulk, and all take an array
			continue
		}
		bulk := singleReply([]int64{now, -now, 0, 1, -1, 1 << 53}[rng.IntN(6)], state)
		b := []byte(bulk[:rng.IntN(len(bulk)+1)])
		for range min(rng.IntN(3), len(b)) {
			b[rng.IntN(len(b))] = byte(rng.Uint32())
		}
		hostile(t, fmt.Sprintf("bulk %q", b), Bulk(b), false, false)
	}
}

// hostile gives one reply to each kind of call; must says that it is no decision for any of them, and definite
// that it may say of some kind that no charge was made.
func hostile(t *testing.T, name string, r Reply, must, definite bool) {
	t.Helper()
	s := newStore(t, false, func([]any, int) (Reply, error) { return r, nil })
	scripted, unscripted := limitOf("a", window(10)), limitOf("b", hidden{rules()["FixedWindowFromFirst"]})
	for _, cs := range [][]quota.Charge{
		{{Limit: scripted, Key: "k", Cost: 1}},
		{{Limit: scripted, Key: "k", Cost: 1}, {Limit: scripted, Key: "l", Cost: 1}},
		{{Limit: scripted, Key: "k", Cost: 1, ID: "r"}},
		{{Limit: unscripted, Key: "k", Cost: 1}},
		{{Limit: unscripted, Key: "k", Cost: 1, ID: "r"}},
	} {
		out := make([]quota.Decision, len(cs))
		err := s.ChargeAll(bg, cs, out)
		for _, d := range out {
			if err == nil && (d.At <= 0 || d.At > quota.MaxNumber || d.Remaining > d.Capacity || d.ResetAfter < 0 || d.RetryAfter < 0) {
				t.Errorf("%s to %s: got the decision %v, want a sound one or an error", name, show(cs), d)
			}
		}
		// A swap whose reply is no reply may have happened; an id's record may be of other charges.
		// A reply of the wrong shape comes after the script ran, which may have charged unless it only read.
		if must && err != nil && cs[0].ID == "" {
			want := quota.ChargeUnknown
			if cs[0].Limit == unscripted {
				want = quota.NotCharged
			}
			if got := quota.Charged(err); got != want && !definite {
				t.Errorf("%s to %s: Charged(%v): got %v, want %v", name, show(cs), err, got, want)
			}
		}
		known := errors.Is(err, quota.ErrMisconfigured) || cs[0].ID != "" && errors.Is(err, quota.ErrInvalid)
		if err != nil && !known || err == nil && must {
			t.Errorf("%s to %s: got %v, error %v; want ErrMisconfigured, or a decision if the reply may be one (it must not: %v)", name, show(cs), out, err, must)
		}
	}
}

// Nor does a batch take a hostile reply for decisions.
func TestHostileBatchReplies(t *testing.T) {
	const now = int64(1_795_427_141_791_724)
	for i, r := range []elements{
		nil, {}, {now}, {now, int64(1)}, {now, int64(1), nil}, {now, int64(1), nil, nil, nil}, {-now, int64(1), nil, nil},
		{now, int64(0), nil, nil}, {now, int64(2), nil, nil}, {now, int64(-1), nil, nil}, {now, nil, nil, nil}, {now, "1", nil, nil},
		{now, int64(1), int64(1), nil}, {now, int64(1), errors.New("ERR"), nil}, {now, int64(1), []any{}, nil}, {now, int64(1), 1.5, nil},
		{"x", int64(1), nil, nil}, {int64(0), int64(1), nil, nil}, {int64(math.MinInt64), int64(1), nil, nil},
	} {
		s := newStore(t, false, func([]any, int) (Reply, error) { return r, nil })
		cs := []quota.Charge{{Limit: limitOf("a", window(10)), Key: "k", Cost: 1}, {Limit: limitOf("a", window(10)), Key: "l", Cost: 11}}
		_, errs := Together(bg, s, [][]quota.Charge{cs[:1], cs[1:]})
		if !errors.Is(errs[0], quota.ErrMisconfigured) || !errors.Is(errs[1], quota.ErrMisconfigured) {
			t.Errorf("reply %d %v: got errors %v, want ErrMisconfigured twice", i, []any(r), errs)
		}
	}
	for i, held := range []any{int64(0), "x"} { // the value of one key is no trouble for the other
		s := newStore(t, false, func([]any, int) (Reply, error) { return elements{now, int64(1), held, nil}, nil })
		d, errs := Together(bg, s, [][]quota.Charge{{{Limit: limitOf("a", window(10)), Key: "k", Cost: 1}}, {{Limit: limitOf("a", window(10)), Key: "l", Cost: 1}}})
		if !errors.Is(errs[0], quota.ErrMisconfigured) || errs[1] != nil || !d[1][0].Allowed {
			t.Errorf("value %d: got %v, errors %v; want ErrMisconfigured for its key and a grant of the other", i, d, errs)
		}
	}
}

func show(cs []quota.Charge) (s string) {
	for _, c := range cs {
		s += fmt.Sprintf(" %s %s id %q;", c.Limit.Name(), c.Key, c.ID)
	}
	return s
}
