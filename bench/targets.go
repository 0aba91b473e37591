package main

import (
	"errors"
	"fmt"
)

// A goal is a figure that the library should reach, as a ratio within one run.
type goal struct {
	text  string
	check func(r *report) (measured string, met bool, err error)
}

// busiest is the work of a section with the most goroutines.
func (r *report) busiest(section string, keys int) work {
	return work{section, keys, false, r.machine.size.most()}
}

var errNoFigures = errors.New("—")

var targets = []goal{
	{"Local: the store is faster than x/time/rate, ulule, throttled and httprate on every row", func(r *report) (string, bool, error) {
		return r.worstLocal(localStore, 1, sethvargo)
	}},
	{"Local: the limiter on the store is faster than these on every row", func(r *report) (string, bool, error) {
		return r.worstLocal(localLimiter, 1, sethvargo)
	}},
	{"Local: the store is never slower than 1.2 × the best keyed peer", func(r *report) (string, bool, error) {
		return r.worstLocal(localStore, 1/1.2, "")
	}},
	{"Local: the limiter is never slower than 1.2 × the best keyed peer", func(r *report) (string, bool, error) {
		return r.worstLocal(localLimiter, 1/1.2, "")
	}},
	{"Local: the store is ahead of the best keyed peer on most rows", func(r *report) (string, bool, error) { return r.mostLocal(localStore) }},
	{"Local: the limiter is ahead of the best keyed peer on most rows", func(r *report) (string, bool, error) { return r.mostLocal(localLimiter) }},
	{"Local: no allocation a decision", func(r *report) (string, bool, error) {
		most, found := 0.0, false
		for _, t := range *r.results {
			for _, subject := range []string{localStore, localLimiter} {
				if v, _, _, ok := t.row(subject).of(allocs); ok && t.work.section == "local" {
					most, found = max(most, v), true
				}
			}
		}
		return measured(number(most)+" at most", most < 0.01, found)
	}},
	{"Local: at most half the bytes a key of x/time/rate behind a sync.Map", func(r *report) (string, bool, error) {
		t := r.results.table(work{section: "memory", keys: r.machine.size.local})
		own, _, _, ok := t.row(localStore).of(heapBytes)
		theirs, _, _, ok2 := t.row(xtimeKeyed).of(heapBytes)
		return measured(fmt.Sprintf("%s against %s", number(own), number(theirs)), own <= theirs/2, ok && ok2)
	}},
	{"Local: at most one object a key", func(r *report) (string, bool, error) {
		v, _, _, ok := r.results.table(work{section: "memory", keys: r.machine.size.local}).row(localStore).of(objects)
		return measured(number(v), v <= 1.01, ok)
	}},
	{"HTTP: ahead of each peer on every row, with the fields that it writes", func(r *report) (string, bool, error) { return r.worst("http", httpX, 1, "") }},
	{"Redis, many keys, 256 goroutines: 2 × the best peer's decisions/s, reaching for 2.5", func(r *report) (string, bool, error) {
		return r.against(r.busiest("redis", r.machine.size.redis), decisions, ours, 2)
	}},
	{"Redis, many keys, 256 goroutines: server CPU a decision in the same proportion", func(r *report) (string, bool, error) {
		return r.against(r.busiest("redis", r.machine.size.redis), serverCPU, ours, 2)
	}},
	{"Redis, one key, 256 goroutines: 10 × the best peer's decisions/s, reaching for 15", func(r *report) (string, bool, error) {
		return r.against(r.busiest("redis", 1), decisions, ours, 10)
	}},
	{"Redis, one key, 256 goroutines: server CPU a decision in the same proportion", func(r *report) (string, bool, error) {
		return r.against(r.busiest("redis", 1), serverCPU, ours, 10)
	}},
	{"Leases, one key, 256 goroutines: 20 × the best peer's decisions/s", func(r *report) (string, bool, error) {
		return r.against(r.busiest("redis", 1), decisions, leased, 20)
	}},
	{"Leases, one key, 256 goroutines: within 2 × of the local store", func(r *report) (string, bool, error) {
		own, _, _, ok := r.results.table(r.busiest("redis", 1)).row(leasedRueidis).of(decisions)
		local, _, _, ok2 := r.results.table(r.busiest("local", 1)).row(localLimiter).of(decisions)
		return measured(fmt.Sprintf("%s against %s", number(own), number(local)), own >= local/2, ok && ok2)
	}},
	{"Latency at 70 % of each one's own peak: p99 no worse than the best peer's", func(r *report) (string, bool, error) {
		return r.against(r.busiest("latency", r.machine.size.redis), p99, ours, 1)
	}},
	{"Growth: decisions/s fall by less than 25 % from the fewest keys to the most", func(r *report) (string, bool, error) {
		few, many := r.growth()
		a, _, _, ok := few.of(decisions)
		b, _, _, ok2 := many.of(decisions)
		return measured(fmt.Sprintf("by %.0f %%", 100*(1-b/a)), b > 0.75*a, ok && ok2)
	}},
	{"Growth: bytes a key are constant", func(r *report) (string, bool, error) {
		few, many := r.growth()
		a, _, _, ok := few.of(keyBytes)
		b, _, _, ok2 := many.of(keyBytes)
		return measured(number(a)+" and "+number(b), a == b, ok && ok2)
	}},
}

func measured(text string, met, ok bool) (string, bool, error) {
	if !ok {
		return "", false, errNoFigures
	}
	return text, met, nil
}

// worstLocal compares a subject with all peers but one on the local row where it does worst.
func (r *report) worstLocal(subject string, least float64, except string) (string, bool, error) {
	return r.worst("local", subject, least, except)
}

// worst does the same in any section.
func (r *report) worst(section, subject string, least float64, except string) (string, bool, error) {
	worst, where, found := 0.0, "", false
	for _, t := range *r.results {
		own, _, _, ok := t.row(subject).of(decisions)
		if t.work.section != section || !ok {
			continue
		}
		for _, row := range t.rows {
			if theirs, _, _, ok := row.of(decisions); ok && row.kind == peer && row.subject != except && (!found || own/theirs < worst) {
				worst, where, found = own/theirs, row.subject+" on "+t.work.String(), true
			}
		}
	}
	return measured(times(worst)+" of "+where, worst >= least, found)
}

// mostLocal counts the local rows on which a subject is ahead of every peer.
func (r *report) mostLocal(subject string) (string, bool, error) {
	ahead, rows := 0, 0
	for _, t := range *r.results {
		own, _, _, ok := t.row(subject).of(decisions)
		other, theirs := t.best(decisions, peer)
		if t.work.section != "local" || !ok || other == nil {
			continue
		}
		if rows++; own > theirs {
			ahead++
		}
	}
	return measured(fmt.Sprintf("on %d of %d", ahead, rows), 2*ahead > rows, rows > 0)
}

// against compares the best subject of a kind with the best peer.
func (r *report) against(w work, m metric, k kind, least float64) (string, bool, error) {
	t := r.results.table(w)
	own, v := t.best(m, k)
	other, theirs := t.best(m, peer)
	if own == nil || other == nil {
		return "", false, errNoFigures
	}
	ratio := m.ratio(v, theirs)
	return measured(fmt.Sprintf("%s: %s of %s, against %s of %s", times(ratio), number(v), own.subject, number(theirs), other.subject), ratio >= least, true)
}

// growth returns this library's rows with the fewest and with the most keys.
func (r *report) growth() (few, many *row) {
	n := r.machine.size.growth
	return r.results.table(r.busiest("growth", n[0])).row(onRueidis),
		r.results.table(r.busiest("growth", n[len(n)-1])).row(onRueidis)
}
