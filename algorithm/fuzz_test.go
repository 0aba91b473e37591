package algorithm_test

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

const exact = 1 << 53 // a number in Lua is exact up to here

// FuzzDecide gives rules states that they never wrote, and clocks and requests of any size.
func FuzzDecide(f *testing.F) {
	tail := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, base), 5)
	f.Add(byte(bucket), int64(10), int64(21), int64(2_000_000_000), int64(200_000), int64(1_000_000), int64(base), int64(0), []byte(nil), byte(0), int64(3), int64(0), int64(base+second))
	f.Add(byte(slidingLog), int64(10), int64(0), int64(1_000_000_000), int64(1), int64(5), int64(0), int64(0), tail, byte(3), int64(3), int64(base), int64(base-2*second))
	f.Fuzz(func(t *testing.T, k byte, limit, refill, period, unit, a, b, c int64, tail []byte, op byte, cost, at, now int64) {
		r, err := newRule(kind(k%byte(len(kinds))), limit, refill, time.Duration(period))
		if err != nil {
			return
		}
		s := quota.State{Unit: unit, A: a, B: b, C: c}
		for r.kind == slidingLog && len(tail) >= 8 && len(s.Tail) < quota.MaxTail { // other rules have no list
			s.Tail = append(s.Tail, int64(binary.BigEndian.Uint64(tail)))
			tail = tail[8:]
		}
		req := quota.Request{Op: quota.Op(op), Cost: cost, Arg: quota.Micros(at)}
		before := slices.Clone(s.Tail)
		r.Decide(s, req, quota.Micros(now)) // must not panic
		if !slices.Equal(before, s.Tail) {
			t.Fatalf("tail of the argument: got %v, want it unchanged, %v", s.Tail, before)
		}

		// What a store decodes is within ±2^53, and so is its clock, which has no negative times.
		s.Unit, s.A, s.B, s.C = max(s.Unit%exact, -(s.Unit%exact), 1), s.A%exact, s.B%exact, s.C%exact
		for i := range s.Tail {
			s.Tail[i] %= exact
		}
		ops := []quota.Op{quota.OpTake, quota.OpPeek, quota.OpDebit, quota.OpRefund, quota.OpReset, quota.OpUpTo}
		req.Op, req.Cost, now = ops[int(req.Op)%len(ops)], max(req.Cost, 0), max(now%exact, 0)
		switch req.Op {
		case quota.OpTake, quota.OpPeek: // which have no time of a charge
			req.Floor = max(at, 0)
		case quota.OpUpTo:
			req.Arg, req.Floor = quota.Micros(max(at/2, 0)), max(at%2, 0)
		}
		got, v := r.Decide(s, req, quota.Micros(now))
		if again, w := r.Decide(s, req, quota.Micros(now)); w != v || !sameState(again, got) {
			t.Errorf("second decision: got %+v %+v, want %+v %+v", again, w, got, v)
		}
		asks := req.Op.Deniable()
		switch {
		case v.Remaining > r.limit:
			t.Errorf("remaining: got %d, want %d at most", v.Remaining, r.limit)
		case v.Allowed != (v.RetryAfter == 0), v.RetryAfter < 0, v.ResetAfter < 0:
			t.Errorf("waits: got %v and %v, want 0 or more, retry after above 0 only of a denial", v.RetryAfter, v.ResetAfter)
		case !asks && !v.Allowed:
			t.Errorf("%v: got it denied, want it allowed", req.Op)
		case asks && (req.Need() > r.limit) != (v.RetryAfter == quota.Forever):
			t.Errorf("retry after: got %v, want Forever only above the limit", v.RetryAfter)
		case v.Write && (!v.Allowed || req.Op == quota.OpPeek) && !aheadOf(r.kind, even(s), now):
			t.Error("denial or peek: got a write, want none")
		case !v.Write && !sameState(got, s):
			t.Errorf("state without a write: got %+v, want %+v", got, s)
		}
		for _, n := range append([]int64{got.Unit, got.A, got.B, got.C}, got.Tail...) {
			if v.Write && r.kind != slidingLog && (n > exact || n < -exact) {
				t.Errorf("number of the state: got %d, want it within ±%d", n, int64(exact))
			}
		}
		if len(got.Tail) > quota.MaxTail {
			t.Errorf("tail: got %d numbers, want %d at most", len(got.Tail), quota.MaxTail)
		}
		if t.Failed() {
			t.Fatalf("limit %d refill %d in %dµs: %v of %d (at %d) at %d on %+v gives %+v %+v",
				r.limit, r.refill, r.period, req.Op, req.Cost, req.Arg, now, s, v, got)
		}
	})
}

// even returns s without the last number of a list that breaks off within an entry.
func even(s quota.State) quota.State {
	s.Tail = s.Tail[:len(s.Tail)&^1]
	return s
}

// FuzzLimits checks that a constructor accepts only arguments that keep every number exact.
func FuzzLimits(f *testing.F) {
	f.Add(byte(bucket), int64(1<<40), int64(1_000_000_007), int64(time.Hour))
	f.Add(byte(sliding), int64(1<<20-1), int64(0), int64((1<<31-1)*time.Microsecond))
	f.Fuzz(func(t *testing.T, k byte, limit, refill, period int64) {
		r, err := newRule(kind(k%byte(len(kinds))), limit, refill, time.Duration(period))
		if err == nil {
			checkSpec(t, r)
		} else if !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("error: got %v, want ErrInvalid", err)
		}
	})
}
