package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// A goal is a figure that the library should reach, as a ratio within one run.
type goal struct {
	text  string
	check func(r *report) (measured string, met bool, err error)
}

// busiest is the work of a section with the most goroutines.
func (r *report) busiest(section string, keys int) work {
	return work{section: section, keys: keys, goroutines: r.machine.size.most()}
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
	{"HTTP: ahead of each peer on every row, with the fields that it writes", func(r *report) (string, bool, error) {
		return r.worst(decisions, 1, func(w work, own, _ *row) bool { return w.section == "http" && own.subject == httpX })
	}},
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
	{"Redis, 1, 2 and 4 callers: a decision costs at most 1.1 × a script call of the bare client", func(r *report) (string, bool, error) {
		return r.worstPair("callers", 1/1.1, onGoRedis, onRueidis)
	}},
	{"Redis, 1, 2 and 4 callers: through Standard at most 1.15 ×", func(r *report) (string, bool, error) {
		return r.worstPair("callers", 1/1.15, standardGoRedis, standardRueidis)
	}},
	{"Main job, 1 goroutine: 2 × the best peer's calls in sequence, on one server and on a cluster", func(r *report) (string, bool, error) { return r.worstJob(1, 2) }},
	{"Main job, 256 goroutines: 4 × these", func(r *report) (string, bool, error) { return r.worstJob(r.machine.size.most(), 4) }},
	{"Request ids: at least half of the decisions/s without, in memory", func(r *report) (string, bool, error) { return r.worstPair("ids", 0.5, localIDs) }},
	{"Request ids: at least half of the decisions/s without, on Redis", func(r *report) (string, bool, error) {
		return r.worstPair("ids", 0.5, goRedisIDs, rueidisIDs)
	}},
	{"Redis Cluster, many keys, 64 and 256 goroutines: ahead of ulule/limiter, auto-pipelined, with either client", func(r *report) (string, bool, error) {
		return r.worst(decisions, 1, func(w work, own, other *row) bool {
			return w.section == "cluster" && w.keys > 1 && w.goroutines > 1 && own.kind == ours && other.subject == ululeAuto
		})
	}},
	{"Latency at each rate: p99 no worse than the best peer's, with either client", func(r *report) (string, bool, error) {
		return r.worst(p99, 1, func(w work, own, _ *row) bool { return w.section == "latency" })
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

// worst compares this library's rows with the peers' in those comparisons that count, and finds where it does worst. A row
// that has no figures, or once did not keep the rate, could not do worse.
func (r *report) worst(m metric, least float64, counts func(w work, own, other *row) bool) (string, bool, error) {
	worst, where, found := 0.0, "", false
	for _, t := range *r.results {
		for _, own := range t.rows {
			v, _, _, ok := own.of(m)
			for _, other := range t.rows {
				theirs, _, _, ok2 := other.of(m)
				if !ok2 || own.kind != ours || other.kind != peer || !counts(t.work, own, other) {
					continue
				}
				ratio := 0.0
				if ok && own.behind() == 0 {
					ratio = m.ratio(v, theirs)
				}
				if !found || ratio < worst {
					worst, where, found = ratio, fmt.Sprintf("%s beside %s: %s", own.subject, other.subject, t.work.title()), true
				}
			}
		}
	}
	return measured(times(worst)+", "+where, worst >= least, found)
}

// worstLocal compares a subject with all peers but one.
func (r *report) worstLocal(subject string, least float64, except string) (string, bool, error) {
	return r.worst(decisions, least, func(w work, own, other *row) bool {
		return w.section == "local" && own.subject == subject && other.subject != except
	})
}

// worstJob compares the main job with the peers' calls in sequence.
func (r *report) worstJob(goroutines int, least float64) (string, bool, error) {
	return r.worst(decisions, least, func(w work, _, other *row) bool {
		return (w.section == "job" || w.section == "cluster job") && w.goroutines == goroutines && strings.HasSuffix(other.subject, inSequence)
	})
}

// worstPair compares subjects with those that they are paired with.
func (r *report) worstPair(section string, least float64, subjects ...string) (string, bool, error) {
	worst, where, found := 0.0, "", false
	for _, t := range *r.results {
		for _, own := range t.rows {
			other := t.pair(own)
			if t.work.section != section || other == nil || !slices.Contains(subjects, own.subject) {
				continue
			}
			if ratio, _ := own.beside(other, decisions); !found || ratio < worst {
				worst, where, found = ratio, own.subject+": "+t.work.title(), true
			}
		}
	}
	return measured(fmt.Sprintf("%s the decisions/s, %s the cost: %s", times(worst), times(1/worst), where), worst >= least, found)
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
