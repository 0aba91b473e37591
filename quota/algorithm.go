package quota

import (
	"math"
	"time"
)

// Micros is a time in microseconds since the Unix epoch, or a span of microseconds.
type Micros int64

// The span after which nothing comes: the RetryAfter of a cost that can never fit.
const (
	// Never is the span in a [Decision].
	Never time.Duration = math.MaxInt64
	// Forever is the span in a [Verdict].
	Forever Micros = math.MaxInt64
)

// Time returns m as a time, in UTC.
func (m Micros) Time() time.Time { return time.UnixMicro(int64(m)).UTC() }

// Duration returns the span m as a duration; it is Never for Forever and for any span that a duration cannot hold.
func (m Micros) Duration() time.Duration {
	if m >= math.MaxInt64/1000 {
		return Never
	}
	return time.Duration(m) * time.Microsecond
}

// An Algorithm is a rule: it decides a request, given the consumption so far. Package algorithm has the usual ones. Only
// stores call an Algorithm, through package quota/driver; authors of rules implement one.
//
// It must be a pure function: no clock, no randomness, no I/O, no panic on any input, integers only. A value is
// immutable and safe for concurrent use. It must keep these rules, which package conformance checks:
//
//  1. Fresh: the zero State is a key never seen. A state whose ResetAfter has passed decides as the zero
//     State does, so a store may drop it then.
//  2. Tight: a denied request is denied again at any time before RetryAfter has passed, and admitted
//     when it has, if no other charge came in between.
//  3. Traceless: a denial and an [OpPeek] return Write false (but see 5).
//  4. Never: a cost above Spec.Capacity, floor included, is denied with RetryAfter [Forever], whatever the state.
//  5. Clock: time that steps back never frees quota. A state more than a second ahead of now is moved
//     to now, its consumption unchanged, and returned with Write true, even on a denial.
//  6. Change: a state left by the same Rule with other numbers (its Unit differs) is converted: consumed
//     tokens stay consumed, in whole tokens, rounded up.
//  7. Untouched: Decide does not write to State.Tail and returns a new slice where it changes.
//  8. Stateless: a rule whose Spec has Unit 0 keeps no state. It is asked with the zero State and never writes. It
//     decides under a limit's name beside the state of any other rule, which stays as it is.
//
// An Algorithm may have a method Err() error: where it returns an error, such as that of numbers which its constructor refuses,
// [NewLimit] makes no valid limit of it, and none of its other methods is called.
type Algorithm interface {
	// Spec describes the algorithm. Equal specs decide equally.
	Spec() Spec
	// Decide returns the verdict on a request at the store's time now, and the new state. The caller must keep that
	// state if the verdict says Write and the list of charges that the request belongs to is granted. s is a state
	// that the same Rule returned before, or zero; its Tail must not be modified. r.Cost is 0 or more.
	Decide(s State, r Request, now Micros) (State, Verdict)
}

// A Forecaster is an Algorithm that can tell how long a queue takes. [Limiter.Wait] asks it, so that a caller whose
// deadline comes too early is refused at once.
type Forecaster interface {
	// Forecast returns a lower bound on the time, counted from d.At, until n more tokens are admitted in requests of
	// any size that come one after the other. d is the decision on a peek of n tokens, or of the capacity where n
	// exceeds it.
	Forecast(d Decision, n int64) time.Duration
}

// Rule names a rule and the layout of its state, such as "tb1": letters, digits, '.', '_' and '-', in
// ASCII, padded with zero bytes. The zero Rule stands for no state. A new layout has a new Rule.
type Rule [8]byte

// String returns the name without its padding.
func (r Rule) String() string {
	n := 0
	for n < len(r) && r[n] != 0 {
		n++
	}
	return string(r[:n])
}

// Valid reports whether r is a name that stores can write and read back.
func (r Rule) Valid() bool {
	n := len(r.String())
	for i, c := range r {
		if i < n && !nameByte(c) || i >= n && c != 0 {
			return false
		}
	}
	return n > 0
}

// Spec describes an algorithm: its rule and its numbers. Specs are comparable, and equal ones decide equally.
type Spec struct {
	Rule     Rule
	Unit     int64 // the unit that states of this spec carry, see State; 0 where the rule keeps no state
	Capacity int64 // the most tokens one request can take; 0 denies every cost above 0
	Debt     int64 // how far OpDebit may push consumption past Capacity, in tokens; any more is forgotten
	// Ahead says that the rule decides OpAhead: it carries debt over until refill has repaid it, or has none. A rule that
	// forgets debt, as windows do at their end, must leave it false; an OpAhead is then refused before the rule sees it.
	Ahead bool
	// TTL says that the rule has holds, see OpHold, and how long one lasts, in whole microseconds: it lapses at Lapse. 0 says
	// that the rule has none: OpHold, OpSpend and OpRenew are then refused before the rule sees them.
	TTL time.Duration
	// Reads is another rule whose states this rule reads as its own, or zero: a limit of that rule may become one of this
	// rule while it is in use.
	Reads Rule
	// Window is the time in which the whole Capacity comes back: the window of a rule that has one, and the time in which a
	// bucket fills. 0 says that there is no such time, or that the rule does not tell.
	Window time.Duration
	// Params are the rule's integer parameters, in the order its Lua twin takes them.
	Params [8]int64
}

// Lapse returns when a hold lapses that is made or renewed at now: at the first multiple of a sixteenth of TTL that is no
// earlier than now + TTL, so less than a sixteenth later. Holds that lapse at one time are told apart no more, and
// thus a state stays small however many tokens are held.
func (s *Spec) Lapse(now Micros) Micros {
	ttl := Micros(s.TTL / time.Microsecond)
	slot := max(ttl/16, 1)
	at := now + ttl + slot - 1
	return at - at%slot
}

// State is the consumption of one limit and key: a few integers whose meaning is the rule's own, and for some rules
// a list. The zero State is a key never seen. Every number is within ±[MaxNumber].
type State struct {
	Unit    int64   // the unit that the numbers count in; 0 in the zero State only
	A, B, C int64   // the rule's numbers
	Tail    []int64 // the rule's list, at most MaxTail numbers; never modified in place
}

// IsZero reports whether s is the zero State.
func (s *State) IsZero() bool { return s.Unit == 0 }

// Op is an operation on a quota. The zero Op takes.
type Op uint8

const (
	// OpTake charges Cost if it fits above the floor, see Charge.Floor, and is denied otherwise. A cost of 0 asks whether the
	// key is out of debt, or above the floor.
	OpTake Op = iota
	// OpPeek answers as OpTake would and changes nothing.
	OpPeek
	// OpDebit charges Cost whether it fits or not, into debt if need be, down to Spec.Debt. It is always allowed.
	OpDebit
	// OpRefund gives back up to Cost of a charge made at Request.Arg, at least as much as if the charge had never been
	// made. A refund to a quota that was whole since, or to a window that has passed, has no effect, and no refund
	// lifts a quota above its capacity. It is always allowed.
	OpRefund
	// OpReset makes the key fresh. It is always allowed.
	OpReset
	// OpAhead takes ahead of refill: it charges Cost now, into debt if need be, if refill will have repaid that debt
	// within a stated delay, and is denied otherwise. The tokens may be used after Decision.Delay; until then refill
	// goes to them, and takes are denied. Only rules with Spec.Ahead have it; to others it is ErrInvalid.
	OpAhead
	// OpUpTo takes as much as there is: it charges Cost, or as many tokens as are left above the floor if those are fewer,
	// and is denied where that is less than Charge.Least. Decision.Charged says how much.
	OpUpTo
	// OpHold holds Cost tokens if they fit above the floor, as OpTake charges them, and is denied otherwise. Held tokens are not
	// charged, and cannot be taken: they come back when OpSpend ends the hold, or else at Decision.Until, when the hold
	// lapses by itself, so that tokens held by a process that died are free again. Only rules with Spec.TTL have holds; to
	// others OpHold, OpSpend and OpRenew are ErrInvalid.
	OpHold
	// OpSpend ends a hold: up to Charge.Held of the tokens that are held until Charge.Until come back, and Cost is charged as
	// OpDebit does. A Cost of 0 releases the hold. Where the hold has lapsed Cost is charged all the same. It is always
	// allowed, but see Charge.ID. A state has no holds of single callers but their sums by time of lapse: a hold that is ended twice ends
	// another one, unless a request id or a Limiter sees to it.
	OpSpend
	// OpRenew has Charge.Held of the tokens that are held until Charge.Until lapse when those of a hold made now would: all of
	// them, or it is denied, with RetryAfter Never, where fewer are held until then. It brings back no hold that has
	// lapsed. Decision.Until is the new time. Its Cost is 0.
	OpRenew
	opEnd
)

var opNames = [...]string{"take", "peek", "debit", "refund", "reset", "take-ahead", "take-up-to", "hold", "spend", "renew"}

// String returns the operation's name in lower case.
func (o Op) String() string {
	if o < opEnd {
		return opNames[o]
	}
	return "unknown"
}

// Deniable reports whether a charge with the operation may be denied: OpTake, OpPeek, OpAhead, OpUpTo, OpHold and OpRenew. The
// others are always allowed.
func (o Op) Deniable() bool { return o <= OpPeek || o >= OpAhead && o <= OpRenew && o != OpSpend }

// Holds reports whether the operation makes, ends or renews a hold: OpHold, OpSpend and OpRenew.
func (o Op) Holds() bool { return o >= OpHold && o <= OpRenew }

// Request is the question that an Algorithm decides.
type Request struct {
	Op   Op
	Cost int64 // in tokens, 0 or more, without upper bound
	// Arg is the operation's own number: of OpRefund Charge.MadeAt, where 0 is long ago, of OpAhead Charge.Within, of OpUpTo
	// Charge.Least, of OpSpend and OpRenew Charge.Until.
	Arg Micros
	// Floor is how many tokens must be left after an OpTake, OpPeek, OpUpTo or OpHold, 0 or more, without upper bound: a take
	// fits where Cost and Floor together fit, see Need, and charges Cost. Of OpSpend and OpRenew it is Charge.Held. It is 0 for
	// other operations.
	Floor int64
}

// Need returns Cost and Floor together, or the largest number where their sum is beyond it: what must remain for the
// request to be allowed, and the number of which rule 4 of [Algorithm] speaks. Of an OpUpTo it is Charge.Least and Floor, and 0
// of an OpSpend and OpRenew.
func (r Request) Need() int64 {
	switch r.Op {
	case OpUpTo:
		r = r.Taking(0)
	case OpSpend, OpRenew:
		return 0
	}
	if r.Floor > math.MaxInt64-r.Cost {
		return math.MaxInt64
	}
	return r.Cost + r.Floor
}

// Taking returns the OpTake for which an OpUpTo stands where so many tokens remain, below 0 in debt. An Algorithm decides
// that in its place.
func (r Request) Taking(remaining int64) Request {
	r.Op, r.Cost, r.Arg = OpTake, max(min(r.Cost, remaining-min(r.Floor, 1<<62)), int64(r.Arg)), 0
	return r
}

// Outcome is the yes-or-no part of a Verdict.
type Outcome struct {
	Allowed bool
	Write   bool // the returned state differs from the given one and must be kept
}

// Verdict is an Algorithm's answer. It has four fields because the compiler keeps no more in registers.
type Verdict struct {
	Outcome
	Remaining  int64  // tokens that can be taken now; negative in debt
	RetryAfter Micros // how long until the same request fits, Forever if it can never; 0 where allowed, but of OpAhead Decision.Delay
	ResetAfter Micros // how long until the key is as fresh
}
