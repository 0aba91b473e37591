package engine

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func rules() map[string]quota.Algorithm {
	return map[string]quota.Algorithm{
		"TokenBucket":          algorithm.TokenBucket(10, 3, 7*time.Second),
		"FixedWindow":          window(10),
		"FixedWindowFromFirst": algorithm.FixedWindowFromFirst(10, time.Hour),
		"SlidingWindow":        algorithm.SlidingWindow(10, 3*time.Second),
		"SlidingWindowLog":     algorithm.SlidingWindowLog(10, 3*time.Second),
	}
}

// A release must read the states that the one before wrote: a change here needs a new Rule.
func TestPackGolden(t *testing.T) {
	const file = "testdata/packed.golden"
	var got []string
	for _, name := range []string{"TokenBucket", "FixedWindow", "FixedWindowFromFirst", "SlidingWindow", "SlidingWindowLog"} {
		var it driver.Item
		for i, cost := range []int64{3, 1, 20, 1 << 62} {
			c := quota.Charge{Limit: limitOf("n", rules()[name]), Key: "k", Cost: cost, Op: quota.OpDebit}
			if err := driver.ApplyOne(&c, &it, 1_795_427_141_791_724+1_700_001*quota.Micros(i), new(quota.Decision)); err != nil {
				t.Fatal(err)
			}
			got = append(got, fmt.Sprintf("%s %d %x", name, cost, pack(&it)))
		}
	}
	if *update {
		if err := os.WriteFile(file, []byte(strings.Join(got, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Split(strings.TrimSpace(string(text)), "\n")
	if len(got) != len(want) {
		t.Fatalf("lines of %s: got %d, want %d", file, len(got), len(want))
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("packed state:\n got %s\nwant %s", got[i], want[i])
		}
	}
}

func TestPackRoundTrip(t *testing.T) {
	rng := random(t)
	number := func() int64 {
		switch n := int64(1) << rng.IntN(54); rng.IntN(4) {
		case 0:
			return 0
		case 1:
			return n
		case 2:
			return -n
		default:
			return rng.Int64N(n)
		}
	}
	for range 20_000 {
		it := driver.Item{State: quota.State{Unit: 1 + rng.Int64N(1<<rng.IntN(53)), A: number(), B: number(), C: number()}}
		copy(it.Rule[:], "abcdefgh"[:1+rng.IntN(8)])
		for range rng.IntN(2) * rng.IntN(9) {
			it.State.Tail = append(it.State.Tail, number())
		}
		back, err := unpack(pack(&it))
		if err != nil || !reflect.DeepEqual(back, it) {
			t.Fatalf("unpack(pack(it)): got %+v, %v, want %+v", back, err, it)
		}
	}
	if it, err := unpack(""); err != nil || !reflect.DeepEqual(it, driver.Item{}) {
		t.Errorf("unpack of no bytes: got %+v, %v, want the zero Item", it, err)
	}
	most := driver.Item{Rule: quota.Rule{'a'}, State: quota.State{Unit: 1, Tail: make([]int64, quota.MaxTail)}}
	if _, err := unpack(pack(&most)); err != nil {
		t.Errorf("unpack of the longest tail: got error %v, want nil", err)
	}
	most.State.Tail = make([]int64, quota.MaxTail+1)
	if _, err := unpack(pack(&most)); !errors.Is(err, quota.ErrMisconfigured) {
		t.Errorf("unpack of a tail that is too long: got error %v, want ErrMisconfigured", err)
	}
}

func FuzzUnpack(f *testing.F) {
	for _, a := range rules() {
		it := driver.Item{Rule: a.Spec().Rule, State: quota.State{Unit: a.Spec().Unit, A: 1, B: 2, C: 3, Tail: []int64{4, 5}}}
		f.Add(pack(&it))
		it.State.C, it.State.Tail = 0, nil
		f.Add(pack(&it))
	}
	f.Fuzz(func(t *testing.T, v string) {
		it, err := unpack(v)
		if err != nil {
			if !errors.Is(err, quota.ErrMisconfigured) || !reflect.DeepEqual(it, driver.Item{}) {
				t.Fatalf("unpack: got %+v, %v, want the zero Item and ErrMisconfigured", it, err)
			}
			return
		}
		for _, n := range append([]int64{it.State.Unit, it.State.A, it.State.B, it.State.C}, it.State.Tail...) {
			if !exact(n) {
				t.Fatalf("a number of the state: got %d, want one that is exact in Lua", n)
			}
		}
		if v != "" && it.State.Unit < 1 {
			t.Fatalf("unit: got %d, want at least 1", it.State.Unit)
		}
		if v == "" {
			return
		}
		if head := header(it.Rule, it.State.Unit); !strings.HasPrefix(v, head) {
			t.Fatalf("first bytes of %+v: got %q, want %q", it, v[:min(len(v), len(head))], head)
		}
		if back, err := unpack(pack(&it)); err != nil || !reflect.DeepEqual(back, it) {
			t.Fatalf("unpack(pack(it)): got %+v, %v, want %+v", back, err, it)
		}
	})
}

// A record that something else wrote is an error.
func FuzzReplay(f *testing.F) {
	cs := []quota.Charge{{Limit: limitOf("a", window(10)), Key: "k", Cost: 1, ID: "r"}, {Limit: limitOf("b", window(10)), Key: "k", Cost: 1, ID: "r"}}
	head := recordHead(cs)
	now := string(appendNumber(nil, 1_795_427_141_791_724))
	f.Add(now + now + now)
	f.Add(now + string(appendNumber(appendNumber(nil, 0), 0)))
	f.Add(now + string(appendNumber(nil, 1<<56-1)))
	f.Fuzz(func(t *testing.T, rest string) {
		for _, grant := range []string{rest, head + rest} {
			out := make([]quota.Decision, 2)
			if err := replay(grant, cs, out); err != nil {
				if !errors.Is(err, quota.ErrMisconfigured) && !errors.Is(err, quota.ErrInvalid) {
					t.Fatalf("replay: got error %v, want ErrMisconfigured or ErrInvalid", err)
				}
			} else if !quota.Granted(out) || !out[0].Replayed || !out[1].Replayed {
				t.Fatalf("replay: got %v, want a grant that is replayed", out)
			}
		}
	})
}
