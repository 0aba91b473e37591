package algorithm

import (
	"fmt"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// held adds holds to a rule: tokens that are neither charged nor free, until they are spent or their time has passed.
//
// State: that of the rule inside. Where tokens are held the Tail begins with holdsMark and the number of pairs, the time of the
// last change, and the pairs in order, each a time of lapse in µs and the sum of the tokens that are held until then; behind
// them is the tail of the rule inside. So a state without holds is one of the rule inside.
type held struct {
	inner quota.Algorithm
	in    quota.Spec // of inner
	spec  quota.Spec
	pool  bool // of Concurrency: no rule is inside but the capacity
}

const (
	// holdsMark is where the first number of a tail with holds begins: no rule's own numbers are as large.
	holdsMark = 1<<53 - 1 - maxSlots
	// maxSlots is how many pairs a state has. Holds of one ttl have 18 at most. Of more than three ttls at a time, those that
	// lapse first do so with the next.
	maxSlots = 63
	// slotNumbers is how many numbers of a tail the holds of one ttl take.
	slotNumbers = 2 + 2*18
)

// Held returns a rule with holds, see [quota.OpHold]: tokens that a caller expects to use are held, and later spent, as many as
// were really used. A hold that is not spent lapses by itself when the ttl has passed, a sixteenth of it later at most, so that
// a process that dies costs nothing for longer. The ttl should be a little above the time between two renewals, and not that
// of the longest task. Accepted: whole microseconds from one millisecond to ten years.
//
//	limit := quota.NewLimit("tokens", algorithm.Held(algorithm.TokenBucket(100_000, 100_000, time.Minute), time.Minute))
//
// Held tokens cannot be taken: a request is admitted where it fits beside them, exactly as the rule inside admits it above a
// floor of as many tokens. RetryAfter counts refill and the holds that lapse; where a hold is spent before, the request
// fits sooner. Decision.Remaining is without held tokens. It may be below -Spec.Debt by as many.
// All operations of the rule inside are there but OpAhead. The state is of constant size, however many tokens
// are held: holds that lapse within a sixteenth of the ttl are one sum. So the rule cannot tell one holder from another;
// request ids, and a Limiter, see to it that a hold is spent once.
//
// The ttl and the numbers of the rule inside may change while the limit is in use, and a limit of the rule inside may become
// one with holds; back it may not. At most three ttls of one limit may be in use at a time, or some holds lapse up to a slot later and
// are not found. Where the clock is set back by more than a second holds keep the time that they have left, and are found no
// more: a spend of one gives nothing back, until it lapses.
//
// The rule inside is one of this package, or any other that leaves room: its Rule has at most seven bytes, its Spec.Params leave the
// eighth, it keeps a state, and states whose numbers are all 0 are fresh to it. Others, and rules that have holds already,
// are [quota.ErrInvalid].
func Held(rule quota.Algorithm, ttl time.Duration) quota.Algorithm {
	return carry(makeHeld(rule, ttl))
}

func makeHeld(rule quota.Algorithm, ttl time.Duration) (quota.Algorithm, error) {
	if rule == nil {
		return nil, invalid("rule to hold tokens of is nil; accepted: a rule that keeps a state")
	}
	if bad, ok := rule.(interface{ Err() error }); ok && bad.Err() != nil {
		return nil, bad.Err()
	}
	in := rule.Spec()
	switch {
	case in.TTL != 0:
		return nil, invalid("rule %s has holds already; accepted: one without", in.Rule)
	case in.Unit < 1:
		return nil, invalid("rule %s keeps no state to hold tokens in; accepted: one that does", in.Rule)
	case len(in.Rule.String()) == len(in.Rule):
		return nil, invalid("rule %s has a name of 8 bytes; accepted: up to 7, as a hold's own letter follows", in.Rule)
	case in.Params[7] != 0:
		return nil, invalid("rule %s has %d in its eighth parameter; accepted: 0, as the ttl takes it", in.Rule, in.Params[7])
	}
	return newHeld(rule, ttl, false)
}

// newHeld returns the rule of holds around another one.
func newHeld(rule quota.Algorithm, ttl time.Duration, pool bool) (quota.Algorithm, error) {
	us := int64(ttl / time.Microsecond)
	if us < 1000 || ttl%time.Microsecond != 0 || us > maxSpan {
		return nil, invalid("ttl is %v; accepted: whole microseconds from 1ms to ten years (87600h)", ttl)
	}
	h := &held{inner: rule, in: rule.Spec(), pool: pool}
	h.spec = h.in
	h.spec.Ahead, h.spec.TTL, h.spec.Params[7] = false, ttl, us
	if !pool {
		h.spec.Reads = h.in.Rule
		h.spec.Rule[len(h.in.Rule.String())] = 'h'
	}
	switch rule := rule.(type) {
	case driver.Moving:
		return &heldMoving{heldScripted{h}, rule}, nil
	case driver.Scripted:
		return &heldScripted{h}, nil
	}
	return h, nil
}

// Concurrency returns a rule of at most n tokens in use at once: a limit of concurrent requests, streams or jobs, where each
// takes one, or as many as it weighs. A process that dies costs nothing for longer than the ttl and a sixteenth of it,
// and a holder that goes on for longer must renew. It accepts an n of 0, which denies, to 2^52-1, and the ttl of [Held].
//
// OpHold, OpSpend and OpRenew do as with Held, and whatever a spend costs, all of it comes back. OpTake holds too: it is ended by a refund of its receipt, and
// lapses all the same. OpDebit holds without asking, also above n.
func Concurrency(n int64, ttl time.Duration) quota.Algorithm {
	return carry(makeConcurrency(n, ttl))
}

func makeConcurrency(n int64, ttl time.Duration) (quota.Algorithm, error) {
	if n < 0 || n > maxHeld {
		return nil, invalid("n is %d; accepted: 0 to 2^52-1 (%d)", n, int64(maxHeld))
	}
	return newHeld(pool(n), ttl, true)
}

// pool is a rule of a capacity from which nothing is charged: Concurrency is its holds.
type pool int64

func (p pool) Spec() quota.Spec {
	return quota.Spec{Rule: quota.Rule{'c', 'c', '1'}, Unit: 1, Capacity: int64(p), Debt: maxHeld - int64(p), Params: [8]int64{int64(p)}}
}

func (p pool) Decide(_ quota.State, r quota.Request, _ quota.Micros) (quota.State, quota.Verdict) {
	v := quota.Verdict{Outcome: quota.Outcome{Allowed: true}, Remaining: int64(p)}
	if r.Op.Deniable() && r.Need() > int64(p) {
		v.Allowed, v.RetryAfter = false, forever
	}
	return quota.State{}, v
}

func (p pool) String() string { return fmt.Sprintf("%d concurrent", int64(p)) }

// Lua returns the rule's Lua, see driver.Scripted.
func (p pool) Lua() string { return poolLua }

// Spec returns the spec of the rule inside, with the ttl.
func (h *held) Spec() quota.Spec { return h.spec }

func (h *held) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	t := int64(now)
	if h.pool {
		switch r.Op {
		case quota.OpRefund:
			r = quota.Request{Op: quota.OpSpend, Arg: h.spec.Lapse(r.Arg), Floor: r.Cost}
		case quota.OpSpend:
			r.Cost = 0
		}
	}
	in, head, slots := split(s)
	changed := false
	if quota.Micros(head)-now > ahead {
		slots = shift(slots, t-head)
		for i := 0; i < len(slots); i += 2 {
			slots[i] = max(slots[i], 0)
		}
		changed = true
	}
	for len(slots) > 0 && slots[0] <= t {
		slots = slots[2:]
	}
	sum := int64(0)
	for i := 1; i < len(slots); i += 2 {
		sum = clamp(sum+clamp(slots[i], maxHeld), maxHeld)
	}

	ask := r
	switch r.Op {
	case quota.OpTake, quota.OpPeek, quota.OpUpTo:
		ask.Floor = min(r.Floor, maxHeld+1) + sum
	case quota.OpHold:
		ask.Op, ask.Floor = quota.OpPeek, min(r.Floor, maxHeld+1)+sum
	case quota.OpSpend:
		ask = quota.Request{Op: quota.OpDebit, Cost: r.Cost}
	case quota.OpRenew:
		ask = quota.Request{Op: quota.OpPeek}
	}
	next, v := h.inner.Decide(in, ask, now)
	if v.Write {
		in, changed = next, true
	}
	to := int64(h.spec.Lapse(now))
	after := slots
	switch r.Op {
	case quota.OpTake, quota.OpPeek, quota.OpUpTo, quota.OpHold, quota.OpDebit:
		n, first := r.Cost, v.RetryAfter
		if r.Op == quota.OpUpTo {
			n = r.Taking(h.in.Capacity - sum).Cost // of a pool
		}
		if n = min(n, maxHeld-sum); !v.Allowed {
			v.RetryAfter = h.retryAfter(in, slots, r.Need(), sum, first, now)
		} else if n > 0 && (r.Op == quota.OpHold || h.pool && r.Op != quota.OpPeek) {
			after = with(slots, to, n)
			sum += n
		}
	case quota.OpSpend:
		if i := slotOf(slots, int64(r.Arg)); i >= 0 && r.Floor > 0 {
			n := min(r.Floor, slots[i+1])
			after = without(slots, i, n)
			sum = max(sum-n, 0)
		}
	case quota.OpRenew:
		v.Allowed, v.RetryAfter = r.Floor == 0, 0
		if i := slotOf(slots, int64(r.Arg)); i >= 0 && slots[i+1] >= r.Floor {
			v.Allowed = true
			if r.Floor > 0 && to != slots[i] {
				after = with(without(slots, i, r.Floor), to, r.Floor)
			}
		}
		if !v.Allowed {
			v.RetryAfter = forever
		}
	case quota.OpReset:
		after, sum, changed = nil, 0, !s.IsZero()
	}
	changed = changed || len(after) != len(slots) || len(after) > 0 && &after[0] != &slots[0]
	if n := len(after); n > 0 {
		v.ResetAfter = max(v.ResetAfter, quota.Micros(after[n-2])-now)
	}
	v.Remaining -= sum
	if v.Write = changed; changed {
		s = join(in, t, after, h.in.Unit)
	}
	return s, v
}

// split returns the state of the rule inside, and the holds: the time of their last change, and the pairs.
func split(s quota.State) (in quota.State, head int64, slots []int64) {
	in = s
	if len(s.Tail) > 0 && s.Tail[0] >= holdsMark {
		in.Tail = s.Tail[1:]
		if k := min(s.Tail[0]-holdsMark, int64(len(s.Tail)-2)/2); k > 0 {
			head, slots, in.Tail = s.Tail[1], s.Tail[2:2+2*k], s.Tail[2+2*k:]
		}
		if len(in.Tail) == 0 {
			in.Tail = nil
		}
	}
	if in.A == 0 && in.B == 0 && in.C == 0 && in.Tail == nil {
		in = quota.State{}
	}
	return in, head, slots
}

// join returns the state that split takes apart.
func join(in quota.State, head int64, slots []int64, unit int64) quota.State {
	var tail []int64
	switch {
	case len(slots) > 0:
		if in.Unit == 0 {
			in.Unit = unit
		}
		tail = append(make([]int64, 0, 2+len(slots)+len(in.Tail)), holdsMark+int64(len(slots)/2), head)
		tail = append(tail, slots...)
	case len(in.Tail) > 0 && in.Tail[0] >= holdsMark:
		tail = append(tail, holdsMark)
	default:
		return in
	}
	in.Tail = append(tail, in.Tail...)
	return in
}

// retryAfter returns the time until so many tokens fit beside those that are held then; wait is that of the rule inside while all
// of them are held.
func (h *held) retryAfter(in quota.State, slots []int64, need, sum int64, wait, now quota.Micros) quota.Micros {
	if need > h.in.Capacity {
		return forever
	}
	at := now
	for ; len(slots) > 0; slots = slots[2:] {
		lapse := quota.Micros(slots[0])
		if wait != forever && at+wait < lapse {
			break
		}
		at, sum = max(at, lapse), max(sum-slots[1], 0)
		_, v := h.inner.Decide(in, quota.Request{Op: quota.OpPeek, Cost: need, Floor: sum}, at)
		wait = v.RetryAfter
	}
	if wait == forever {
		return forever
	}
	return max(at+wait-now, 1)
}

// slotOf returns the index of the pair of a time of lapse, or -1.
func slotOf(slots []int64, lapse int64) int {
	for i := 0; i < len(slots); i += 2 {
		if slots[i] == lapse {
			return i
		}
	}
	return -1
}

// without returns a copy of the pairs with n tokens less in pair i.
func without(slots []int64, i int, n int64) []int64 {
	out := append(make([]int64, 0, len(slots)+2), slots...) // with room for those of a renewal
	if out[i+1] -= n; out[i+1] <= 0 {
		out = append(out[:i], out[i+2:]...)
	}
	return out
}

// with returns a copy of the pairs with n tokens more that lapse at the given time.
func with(slots []int64, lapse, n int64) []int64 {
	out := make([]int64, 0, len(slots)+2)
	i := 0
	for ; i < len(slots) && slots[i] < lapse; i += 2 {
		out = append(out, slots[i], slots[i+1])
	}
	if i < len(slots) && slots[i] == lapse {
		n = min(n+slots[i+1], maxHeld)
		i += 2
	}
	out = append(append(out, lapse, n), slots[i:]...)
	if len(out) > 2*maxSlots {
		out[3] = min(out[1]+out[3], maxHeld)
		out = out[2:]
	}
	return out
}

// MaxTail is that of the rule inside, and the holds'.
func (h *held) MaxTail() int {
	if l, ok := h.inner.(driver.Listed); ok {
		return l.MaxTail() + slotNumbers
	}
	return slotNumbers
}

// Share returns a share of the rule inside, with holds of the same ttl. It fails with ErrInvalid where the rule has no shares.
func (h *held) Share(n int64) (quota.Algorithm, error) {
	if s, ok := h.inner.(driver.Sharer); ok {
		return h.around(s.Share(n))
	}
	return nil, invalid("rule %s cannot be shared; accepted: a rule with a method Share, as those of this package", h.in.Rule)
}

// ShareAtLeastOne is Share, with a capacity of at least 1. It fails with ErrInvalid where the rule has no such shares, as
// Concurrency has none: n instances with one token each would have more in use at once than there are.
func (h *held) ShareAtLeastOne(n int64) (quota.Algorithm, error) {
	if s, ok := h.inner.(driver.OneSharer); ok {
		return h.around(s.ShareAtLeastOne(n))
	}
	share, err := h.Share(n)
	if err == nil && h.in.Capacity > 0 && share.Spec().Capacity == 0 {
		return nil, invalid("rule %s cannot give one of its %d tokens to each of %d instances; accepted: as many tokens as instances", h.in.Rule, h.in.Capacity, n)
	}
	return share, err
}

func (h *held) around(share quota.Algorithm, err error) (quota.Algorithm, error) {
	if err != nil {
		return nil, err
	}
	return newHeld(share, h.spec.TTL, h.pool)
}

// Share returns one of n shares, rounded down.
func (p pool) Share(n int64) (quota.Algorithm, error) { return pool(int64(p) / max(n, 1)), nil }

// String returns the rule as [Parse] reads it, if the rule inside has such a text.
func (h *held) String() string {
	ttl := spanText(h.spec.Params[7])
	if h.pool {
		return fmt.Sprintf("%v %s", h.inner, ttl)
	}
	if s, ok := h.inner.(fmt.Stringer); ok {
		return s.String() + " held " + ttl
	}
	return fmt.Sprintf("%s, capacity %d, held %s", h.in.Rule, h.in.Capacity, ttl)
}

// MarshalText returns the text of String, or fails where that is no text for Parse.
func (h *held) MarshalText() ([]byte, error) {
	if _, err := (Text{h.inner}).MarshalText(); err != nil && !h.pool {
		return nil, err
	}
	return []byte(h.String()), nil
}

// heldScripted is held around a rule that has Lua.
type heldScripted struct{ *held }

// Lua returns the rule's Lua, see driver.Scripted.
func (h *heldScripted) Lua() string {
	return fmt.Sprintf("local pool = %v\nlocal function inner(u, a, b, c, tail, op, cost, at, now, unit, p1, p2, p3, p4, p5, p6, p7, p8, keep)\n%s\nend\n%s",
		h.pool, h.inner.(driver.Scripted).Lua(), heldLua)
}

// heldMoving is held around a rule whose Lua takes numbers that change with time.
type heldMoving struct {
	heldScripted
	moving driver.Moving
}

// ParamsAt returns the numbers of the rule inside, and the ttl.
func (h *heldMoving) ParamsAt(now quota.Micros) (params [8]int64, from, to quota.Micros) {
	params, from, to = h.moving.ParamsAt(now)
	params[7] = h.spec.Params[7]
	return params, from, to
}
