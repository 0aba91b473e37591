package engine

import (
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// A charge without a floor, of a rule with up to six parameters, is sent as ever: a floor adds an argument of its own or
// digits behind those of the charge, in a list a number, and further parameters are sent only where there are some.
func TestFloorCostsOthersNothing(t *testing.T) {
	var sent [][]any
	s := newStore(t, false, func(args []any, keys int) (Reply, error) {
		if r := probeReply(args); r != nil {
			return r, nil
		}
		sent = append(sent, args[3+keys:])
		return elements{}, nil
	})
	bucket := limitOf("n", algorithm.TokenBucket(10, 1, time.Second))
	take := quota.Charge{Limit: bucket, Key: "g/k", Cost: 3}
	above, peek := take, take
	above.Floor = 2
	peek.Op, peek.Floor, peek.FloorOf = quota.OpPeek, 1, 5
	last := func(do func()) []any {
		t.Helper()
		n := len(sent)
		if do(); len(sent) != n+1 {
			t.Fatalf("scripts sent: got %d, want 1", len(sent)-n)
		}
		return sent[n]
	}
	alone := func(c quota.Charge) func() { return func() { s.Charge(bg, c) } }
	list := func(cs ...quota.Charge) func() {
		return func() { s.ChargeAll(bg, cs, make([]quota.Decision, len(cs))) }
	}
	for _, c := range []struct {
		name string
		do   func()
		from int // the first of the arguments that are compared
		want string
	}{
		{"a take", alone(take), 2, "[3]"},
		{"a take with a floor", alone(above), 2, "[3 0 0 2]"},
		{"a peek with a floor", alone(peek), 2, "[3 1 0 2]"},
		{"a list", list(take, quota.Charge{Limit: bucket, Key: "g/l", Cost: 4}), 7, "[" + packed(1, 0, 3, 0, 2, 0, 4, 0) + "]"},
		{"a list with floors", list(above, quota.Charge{Limit: bucket, Key: "g/l", Cost: 4}), 7, "[" + packed(1, 1024, 3, 0, 2, 2, 0, 4, 0) + "]"},
	} {
		args := last(c.do)
		if got := fmt.Sprint(args[c.from:]); got != c.want {
			t.Errorf("%s: got arguments %q, want %q", c.name, got, c.want)
		}
	}
	for _, c := range []struct {
		params [8]int64
		bytes  int
	}{{[8]int64{1, 2, 3, 4, 5, 6}, 7 * 7}, {[8]int64{}, 7 * 7}, {[8]int64{6: 1}, 9 * 7}, {[8]int64{7: 1}, 9 * 7}} {
		l := limitOf("p", withParams{bucket.Algorithm(), c.params})
		args := last(alone(quota.Charge{Limit: l, Key: "k", Cost: 1}))
		if got := len(args[1].(string)); got != c.bytes {
			t.Errorf("numbers of a rule with the parameters %v: got %d bytes, want %d", c.params, got, c.bytes)
		}
	}
}

// packed returns numbers as a list of charges has them.
func packed(numbers ...int64) string {
	var b []byte
	for _, n := range numbers {
		b = appendNumber(b, n)
	}
	return string(b)
}

// withParams is a rule with other parameters.
type withParams struct {
	quota.Algorithm
	params [8]int64
}

func (w withParams) Spec() quota.Spec {
	s := w.Algorithm.Spec()
	s.Rule, s.Params = quota.Rule{'p'}, w.params
	return s
}

func (w withParams) Lua() string { return "return true, false, 0, u, a, b, c, tail" }

// eight is a rule whose states show the parameters beyond the sixth, and the floor.
type eight struct{ p7, p8 int64 }

func (e eight) Spec() quota.Spec {
	return quota.Spec{Rule: quota.Rule{'e', 'i', 'g', 'h', 't'}, Unit: 1, Capacity: 10, Params: [8]int64{1, 2, 3, 4, 5, 6, e.p7, e.p8}}
}

func (e eight) Decide(_ quota.State, r quota.Request, _ quota.Micros) (quota.State, quota.Verdict) {
	return quota.State{Unit: 1, A: e.p7, B: e.p8, C: r.Floor}, quota.Verdict{Outcome: quota.Outcome{Allowed: true, Write: true}, ResetAfter: 1e9}
}

func (eight) Lua() string {
	return "if p1 ~= 1 or p6 ~= 6 then return false, false, 0, u, a, b, c, tail end\nreturn true, true, 1000000000, 1, p7, p8, keep, nil"
}

// The last two parameters and the floor reach the kernel of a charge alone, of a batch, and of a list.
func TestEightParameters(t *testing.T) {
	client := redis.NewClient(&redis.Options{Addr: redisserver.Start(t).Addr()})
	defer client.Close()
	calls := 0
	s := quota.Must(New(sender(client, &calls), false, Options{Batching: BatchAll}))
	bucket := limitOf("bucket", algorithm.TokenBucket(10, 1, time.Second))
	for _, params := range []eight{{7, 8}, {0, 8}, {7, 0}, {0, 0}} {
		l := limitOf("n", params)
		c := quota.Charge{Limit: l, Key: "g/k", Cost: 1, Floor: 9}
		other := quota.Charge{Limit: bucket, Key: "g/k"}
		for name, calls := range map[string][][]quota.Charge{
			"alone":           {{c}},
			"a list":          {{c, other}},
			"a batch":         {{c}, {other}},
			"a batch, twice":  {{c}, {c}, {c}},
			"a batch of both": {{c}, {c, other}},
		} {
			client.FlushAll(bg)
			_, errs := Together(bg, s, calls)
			if name == "alone" {
				client.FlushAll(bg)
				_, errs[0] = s.Charge(bg, c)
			}
			for i, err := range errs {
				if err != nil {
					t.Fatalf("%s, call %d: got %v, want nil", name, i, err)
				}
			}
			it, err := unpack(client.Get(bg, "quota:{g}/k:n").Val())
			if want := (quota.State{Unit: 1, A: params.p7, B: params.p8, C: 9}); err != nil || !reflect.DeepEqual(it.State, want) {
				t.Errorf("%s of %+v: got state %+v, %v, want %+v", name, params, it.State, err, want)
			}
		}
	}
}
