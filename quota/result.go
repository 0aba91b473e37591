package quota

import (
	"fmt"
	"math/bits"
	"strings"
	"time"
)

// Result is the answer to a list of charges, see [Charger.ChargeAll].
type Result struct {
	// Granted says that all charges were made, but shadows that do not fit; otherwise none was.
	Granted bool
	// Decider is the index of the charge that decided the list: of the denial that lasts longest, or, in a granted
	// list, of the limit with the smallest share left.
	Decider int
	// Decisions are the answers to the charges, in their order. After TakeFirst they are those of one of its lists: of the
	// one that was charged or, where none was, of the one that fits first.
	Decisions []Decision
	// Taken is the index of that list, and Lists has the decisions on all lists: verdicts, by which nothing was charged, of
	// the others. They are for [Charger.TakeFirst].
	Taken int
	Lists [][]Decision
}

// RetryAfter is 0 where granted, else the time until the same list fits, if no other charge comes in between; Never if
// it cannot.
func (r Result) RetryAfter() time.Duration {
	if r.Granted || len(r.Decisions) == 0 {
		return 0
	}
	return r.Decisions[r.Decider].RetryAfter
}

// String describes the result in one line: the deciding charge, and every decision.
func (r Result) String() string {
	verdict := "denied"
	if r.Granted {
		verdict = "granted"
	}
	decisions := make([]string, len(r.Decisions))
	for i, d := range r.Decisions {
		decisions[i] = d.String()
	}
	return fmt.Sprintf("%s, decided by charge %d of [%s]", verdict, r.Decider, strings.Join(decisions, "; "))
}

// Granted reports whether a list with these decisions was granted: all are allowed, but those of shadows, see
// Charge.Shadow. Of alternatives it reports whether one was.
func Granted(ds []Decision) bool {
	for i := range ds {
		if ds[i].Alternative != ds[0].Alternative {
			return true
		}
		if !ds[i].Allowed && !ds[i].Shadow {
			rest := ds[i:]
			for len(rest) > 0 && rest[0].Alternative == ds[0].Alternative {
				rest = rest[1:]
			}
			return len(rest) > 0 && Granted(rest)
		}
	}
	return true
}

// alternatives returns the decisions on each alternative.
func alternatives(ds []Decision) (lists [][]Decision) {
	for from, i := 0, 1; i <= len(ds); i++ {
		if i == len(ds) || ds[i].Alternative != ds[from].Alternative {
			lists = append(lists, ds[from:i:i])
			from = i
		}
	}
	return lists
}

// taken returns the index of the first list that was granted or, if none was, of the one that fits first.
func taken(lists [][]Decision) (best int) {
	least := Never
	for i, ds := range lists {
		if Granted(ds) {
			return i
		}
		if after := ds[Decider(ds)].RetryAfter; after < least {
			best, least = i, after
		}
	}
	return best
}

// Decider returns the index of the decision that decided a list: of a denied list the denial that lasts longest, of
// a granted one the decision that leaves the smallest share of its limit. A capacity of 0 counts as 1: nothing of it is left,
// or its debt. It passes over shadows. Of alternatives it is the decider of the one that was granted, or fits first. Decider is
// 0 for no decisions, and for shadows alone.
func Decider(ds []Decision) int {
	if n := len(ds); n > 0 && ds[n-1].Alternative != ds[0].Alternative {
		lists, before := alternatives(ds), 0
		i := taken(lists)
		for _, list := range lists[:i] {
			before += len(list)
		}
		return before + Decider(lists[i])
	}
	best := 0
	granted := Granted(ds)
	for i := range ds {
		a, b := &ds[i], &ds[best]
		switch {
		case a.Shadow:
		case b.Shadow:
			best = i
		case granted:
			// Shares are compared as 128-bit products.
			if less(a.Remaining, max(b.Capacity, 1), b.Remaining, max(a.Capacity, 1)) {
				best = i
			}
		case !a.Allowed && (b.Allowed || a.RetryAfter > b.RetryAfter):
			best = i
		}
	}
	return best
}

// less reports whether a*b < c*d, for b and d of at least 1.
func less(a, b, c, d int64) bool {
	if (a < 0) != (c < 0) {
		return a < 0
	}
	neg := a < 0
	if neg {
		a, c = -a, -c
	}
	h1, l1 := bits.Mul64(uint64(a), uint64(b))
	h2, l2 := bits.Mul64(uint64(c), uint64(d))
	if h1 == h2 {
		return l1 != l2 && (l1 < l2) != neg
	}
	return (h1 < h2) != neg
}
