package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// An entry of the ledger is a charge that was made, by the store's time, which all processes share.
type entry struct {
	Limit string `json:"limit"`
	Key   string `json:"key"`
	// Op is take, debit or refund; or hold, for tokens that a denied call took and gave back.
	Op string       `json:"op"`
	N  int64        `json:"n"` // tokens
	At quota.Micros `json:"at"`
	// Until is for a refund whose time is not known, and for the return of a hold: it came between At and Until,
	// or never.
	Until quota.Micros `json:"until,omitempty"`
}

// entriesOf returns the ledger's entries for a call; took is the time from its start to its end.
func entriesOf(charges []quota.Charge, r quota.Result, err error, took time.Duration) []entry {
	var entries []entry
	add := func(c quota.Charge, op string, at, until quota.Micros) {
		if c.Cost > 0 {
			entries = append(entries, entry{c.Limit.Name(), c.Key, op, c.Cost, at, until})
		}
	}
	for i, c := range charges {
		switch {
		case errors.Is(err, quota.ErrIndeterminate) && c.Op == quota.OpRefund:
			add(c, "refund", c.MadeAt, quota.Forever) // it may have been made; a charge of unknown outcome has no entry
		case err != nil: // not charged
		case r.Granted:
			add(c, c.Op.String(), r.Decisions[i].At, 0)
		case r.Decisions[i].Split && r.Decisions[i].Allowed:
			// Decided in several steps: taken here, denied elsewhere, given back before the call returned.
			at := r.Decisions[i].At
			add(c, "hold", at, at+quota.Micros(took/time.Microsecond)+1)
		}
	}
	return entries
}

// A finding is the result of the check for a limit.
type finding struct {
	rule          *rule
	keys          int
	taken, repaid int64  // tokens; debits are taken, refunds are repaid
	peak          int64  // the most tokens that any key spent beyond refill in any interval, rounded up
	excess        string // describes how the limit was exceeded; empty if it was not
}

// check goes through a ledger and reports on each limit.
//
// A bucket's level must never be above its capacity B and, right after a take, never below zero. Between two
// times the level falls by the tokens taken and debited, and rises by refunds, each at its own time, and by
// at most the refill. So for any take, and any earlier start,
//
//	taken + debited - refunded since the start, the take included  <=  B + rate × time since the start
//
// for any state of the bucket before the ledger began. A debit may overdraw the bucket, so the bound does not
// apply to an interval that ends in a debit. The debit counts in all intervals that end in a later take,
// which must have waited until refill had repaid the debt. A refund counts at its own time, not at the time
// of its charge: takes between the two were decided without it.
//
// Charges of one microsecond have no known order. Where an interval ends in them, their refunds count and
// their debits do not, which is the order that allows most.
//
// A refund of unknown time counts from its earliest time. An interval that begins between that and its latest
// time may exceed the bound by the refund's amount, because the refund may have come in that interval. A hold
// is a charge and such a refund: an interval that begins before the hold has both, which cancel, and one that
// begins in it may have the refund alone.
//
// The check is exact, in millionths of a token. The store's clock must not have been set back by more than a
// second during the run: the ledger would show the same time twice.
func check(entries []entry) []finding {
	places := make(map[place][]entry)
	for _, e := range entries {
		p := place{e.Limit, e.Key}
		places[p] = append(places[p], e)
	}
	findings := make([]finding, len(rules))
	for i, r := range rules {
		findings[i].rule = r
		for p, es := range places {
			if p.limit == r.name {
				findings[i].add(p.key, es)
			}
		}
	}
	return findings
}

const micro = 1_000_000 // µs in the second that a rule's refill is for; and parts of a token

// add checks the entries of one key.
func (f *finding) add(key string, es []entry) {
	f.keys++
	slices.SortFunc(es, func(a, b entry) int { return cmp.Compare(a.At, b.At) })
	var (
		first = es[0].At
		spent int64                        // net tokens up to now
		low   int64        = math.MaxInt64 // the least of all starts up to now: tokens spent before it, less refill up to it
		start quota.Micros                 // the time of that start
		open  []entry                      // refunds, and returns of holds, that may still come
	)
	for len(es) > 0 {
		at := es[0].At
		n := 0
		var taken, debited, refunded int64
		for ; n < len(es) && es[n].At == at; n++ {
			switch es[n].Op {
			case "take":
				taken += es[n].N
			case "debit":
				debited += es[n].N
			case "refund":
				refunded += es[n].N
			}
		}
		// The entries of an interval that starts here are counted on top of this line.
		line := spent*micro - f.rule.refill*int64(at-first)
		open = slices.DeleteFunc(open, func(e entry) bool { return e.Until < at })
		from := line
		for _, e := range open {
			from += e.N * micro
		}
		if from < low {
			low, start = from, at
		}
		if taken > 0 {
			beyond := line + (taken-refunded)*micro - low
			f.peak = max(f.peak, (beyond+micro-1)/micro)
			if over := beyond - f.rule.capacity*micro; over > 0 && f.excess == "" {
				f.excess = fmt.Sprintf("key %q: %d.%06d tokens too many between %s and %s",
					key, over/micro, over%micro, clock(start), clock(at))
			}
		}
		spent += taken + debited - refunded
		f.taken += taken + debited
		f.repaid += refunded
		for _, e := range es[:n] {
			if e.Until > at {
				open = append(open, e)
			}
		}
		es = es[n:]
	}
}

func clock(m quota.Micros) string { return m.Time().Format("15:04:05.000000") }

// report prints the findings and returns the exit status: 1 if a limit was exceeded, or if no token was
// admitted, so that the check would show nothing.
func report(w io.Writer, findings []finding) int {
	fmt.Fprintf(w, "\n%-9s %5s %9s %9s   %s\n", "limit", "keys", "charged", "returned", "most beyond refill, in any interval")
	code, taken := 0, int64(0)
	for _, f := range findings {
		fmt.Fprintf(w, "%-9s %5d %9d %9d   %d of %d\n", f.rule.name, f.keys, f.taken, f.repaid, f.peak, f.rule.capacity)
		taken += f.taken
	}
	fmt.Fprintln(w)
	for _, f := range findings {
		if f.excess != "" {
			fmt.Fprintf(w, "EXCEEDED: limit %s, %s\n", f.rule.name, f.excess)
			code = 1
		}
	}
	switch {
	case taken == 0:
		fmt.Fprintln(w, "No token was admitted, so there is nothing to check.")
		return 1
	case code == 0:
		fmt.Fprintln(w, "No limit was exceeded: no interval has more than capacity + rate × its length.")
	}
	return code
}

func encode(w io.Writer, entries []entry) error {
	lines := json.NewEncoder(w)
	for _, e := range entries {
		if err := lines.Encode(e); err != nil {
			return err
		}
	}
	return nil
}

// readLedgers returns the entries of several ledgers together.
func readLedgers(names []string) ([]entry, error) {
	var all []entry
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		number := 0
		for line := range bytes.Lines(text) {
			number++
			e, err := decode(line)
			if err != nil {
				return nil, fmt.Errorf("%s:%d: %w", name, number, err)
			}
			all = append(all, e)
		}
	}
	return all, nil
}

// decode reads one line, within bounds that keep the check's sums far from overflow.
func decode(line []byte) (e entry, err error) {
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(&e); err != nil {
		return e, fmt.Errorf("not a line of a ledger: %w", err)
	}
	if d.More() {
		return e, errors.New("not a line of a ledger: more than one value")
	}
	const earliest, latest = 0, 1 << 52
	switch {
	case !slices.ContainsFunc(rules, func(r *rule) bool { return r.name == e.Limit }):
		err = fmt.Errorf("unknown limit %q", e.Limit)
	case e.Op != "take" && e.Op != "debit" && e.Op != "refund" && e.Op != "hold":
		err = fmt.Errorf("op is %q; accepted: take, debit, refund, hold", e.Op)
	case e.N < 1 || e.N > 1000:
		err = fmt.Errorf("n is %d; accepted: 1 to 1000", e.N)
	case e.At <= earliest || e.At >= latest:
		err = fmt.Errorf("at is %d; accepted: microseconds since 1970", e.At)
	case e.Until != 0 && e.Until < e.At:
		err = fmt.Errorf("until is %d; accepted: no value, or a time from at on", e.Until)
	}
	return e, err
}
