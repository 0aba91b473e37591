package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"time"
)

// work is the task of all subjects of a table. Its section says how it is done.
type work struct {
	section    string // that of a view
	keys       int
	denied     bool
	goroutines int
	how        string // what else tells a table from others of its section, such as the rate that is offered
	on         placement
}

// A placement says on which processors client and server run.
type placement string

const (
	anywhere placement = ""
	onOne    placement = "client and server on one processor"
	onTwo    placement = "a processor each"
)

// callers are the numbers of goroutines that are few: how fast these are depends on the placement.
var callers = []int{1, 2, 4}

// size says how much there is to do.
type size struct {
	local, redis, job, postgres int // keys
	growth                      []int
	goroutines                  [4]int
	rates                       []int // decisions/s
	benchmark                   int   // commands of redis-benchmark
}

// many and most are the numbers of goroutines of tables that come with fewer than all.
func (s *size) many() int { return s.goroutines[2] }
func (s *size) most() int { return s.goroutines[3] }

var (
	full = size{local: 1_000_000, redis: 100_000, job: 10_000, postgres: 10_000, growth: []int{1000, 10_000, 100_000, 1_000_000},
		goroutines: [...]int{1, 2, 64, 256}, rates: []int{1000, 10_000, 50_000}, benchmark: 300_000}
	small = size{local: 1000, redis: 500, job: 100, postgres: 100, growth: []int{100, 1000},
		goroutines: [...]int{1, 2, 8, 32}, rates: []int{1000, 5000}, benchmark: 1000}
)

// runner does the measurements.
type runner struct {
	ctx        context.Context
	log        io.Writer
	counts     int
	long       time.Duration // of one measurement
	limit      time.Duration
	size       size
	placements []placement // of few goroutines on Redis
	results    results
	missed     []string
	endless    map[string]error // the subjects that were given up
}

// miss notes a thing that is not measured, and the reason.
func (r *runner) miss(text string) {
	r.missed = append(r.missed, text)
	fmt.Fprintln(r.log, "NOT MEASURED:", text)
}

// step is one measurement of a subject that is open and whose keys are filled.
type step struct {
	work work
	run  func(ctx context.Context, l *load) (sample, error)
}

// eachCount calls f for every subject once in every count, in random order.
func (r *runner) eachCount(section string, subjects []subject, f func(s subject)) {
	for count := range r.counts {
		for _, i := range rand.Perm(len(subjects)) {
			if r.ctx.Err() != nil {
				return
			}
			fmt.Fprintf(r.log, "%s %s, count %d of %d: %s\n", time.Now().Format(time.TimeOnly), section, count+1, r.counts, subjects[i].name)
			f(subjects[i])
		}
	}
}

func (r *runner) local() {
	one, all := newKeyset(1), newKeyset(r.size.local)
	r.eachCount("local", localSubjects, func(s subject) {
		for _, denied := range []bool{false, true} {
			r.visit(s, nil, one, denied, r.closed(work{section: "local", keys: 1, denied: denied}, r.size.goroutines[:]...))
			steps := r.closed(work{section: "local", keys: all.len(), denied: denied}, r.size.goroutines[:]...)
			if !denied {
				steps = append([]step{{work{section: "memory", keys: all.len()}, memory}}, steps...)
			}
			r.visit(s, nil, all, denied, steps)
		}
	})
}

func (r *runner) redis(at *target) {
	all := newKeyset(r.size.redis)
	r.eachCount("redis memory", redisSubjects, func(s subject) {
		r.visit(s, at, all, false, []step{{work{section: "redis memory", keys: all.len()}, memory}})
	})
	for _, denied := range []bool{false, true} {
		goroutines := []int{r.size.many(), r.size.most()}
		if denied {
			goroutines = goroutines[1:]
		}
		for _, keys := range []int{1, r.size.redis} {
			w := work{section: "redis", keys: keys, denied: denied}
			r.turns(redisSubjects, at, w, r.closed(w, goroutines...))
		}
	}
}

// callers measures few goroutines. A decision takes as long as its round trip, which depends on the placement.
func (r *runner) callers(at *target) {
	subjects := slices.DeleteFunc(slices.Concat(redisSubjects, standardSubjects), func(s subject) bool { return s.kind == leased })
	for _, denied := range []bool{false, true} {
		w := work{section: "callers", keys: r.size.redis, denied: denied}
		r.turns(subjects, at, w, r.placed(w, callers...))
	}
}

// job measures the main job: over keys of one group, and of three.
func (r *runner) job(section string, at *target) {
	for _, grouping := range groupings {
		w := work{section: section, keys: r.size.job, how: grouping.name}
		r.turns(jobSubjects(grouping), at, w, append(r.placed(w, 1), r.closed(w, r.size.most())...))
	}
}

// ids compares charges that have a request id with charges that have none.
func (r *runner) ids(subjects []subject, at *target, how string, goroutines ...int) {
	w := work{section: "ids", keys: r.size.job, how: how}
	r.turns(subjects, at, w, r.closed(w, goroutines...))
}

func (r *runner) redisBenchmarks(at *target) {
	for range r.counts {
		for _, i := range rand.Perm(len(redisBenchmarks)) {
			b := redisBenchmarks[i]
			s, err := bounded(r, func(ctx context.Context) (sample, error) {
				if err := at.flush(); err != nil {
					return nil, err
				}
				return redisBenchmark(ctx, at, r.size.benchmark, r.size.redis, b.command)
			})
			r.results.add(work{section: "benchmark", keys: r.size.redis}, subject{name: b.name, kind: floor}, s, err)
		}
	}
}

func (r *runner) cluster(at *target) {
	floorOnce := slices.DeleteFunc(slices.Clone(redisSubjects), func(s subject) bool { return s.kind == floor && s.name != rueidisINCR })
	one, all := work{section: "cluster", keys: 1}, work{section: "cluster", keys: r.size.redis}
	r.turns(floorOnce, at, one, r.closed(one, r.size.most()))
	r.turns(floorOnce, at, all, append(r.placed(all, 1), r.closed(all, r.size.many(), r.size.most())...))
}

// postgres measures few keys: what is compared is the work of a decision. Beside it comes this library on Redis, if
// that is there.
func (r *runner) postgres(at, redis *target) {
	one, all := newKeyset(1), newKeyset(r.size.postgres)
	subjects := slices.Clone(postgresSubjects)
	if redis != nil {
		subjects = append(subjects, redisSubjects[0])
	}
	closed := func(keys keyset, denied bool) []step {
		return r.closed(work{section: "postgres", keys: keys.len(), denied: denied}, 1, r.size.many())
	}
	r.eachCount("postgres", subjects, func(s subject) {
		to := at
		if s.name == redisSubjects[0].name {
			to = redis
		}
		r.visit(s, to, one, false, closed(one, false))
		r.visit(s, to, all, false, closed(all, false))
		r.visit(s, to, one, true, closed(one, true))
	})
}

// latency offers decisions at fixed rates. The floors show how much of a latency is that of the round trip, and of the
// measurement.
func (r *runner) latency(at *target) {
	all := newKeyset(r.size.redis)
	// Leases are left out: one decision takes less time than the two readings of the clock around it.
	subjects := slices.DeleteFunc(slices.Clone(redisSubjects), func(s subject) bool {
		return s.kind == leased || s.kind == floor && s.name != goRedisINCR && s.name != rueidisINCR
	})
	var steps []step
	for _, rate := range r.size.rates {
		steps = append(steps, step{latencyWork(&r.size, rate), func(ctx context.Context, l *load) (sample, error) {
			l.goroutines = r.size.most()
			if _, err := l.openLoop(ctx, float64(rate), r.long); err != nil {
				return nil, err
			}
			return l.openLoop(ctx, float64(rate), 10*r.long)
		}})
	}
	r.eachCount("latency", subjects, func(s subject) { r.visit(s, at, all, false, steps) })
}

func latencyWork(s *size, rate int) work {
	return work{section: "latency", keys: s.redis, goroutines: s.most(), how: number(float64(rate)) + " decisions/s offered"}
}

func (r *runner) growth(at *target) {
	subjects := slices.DeleteFunc(slices.Clone(redisSubjects), func(s subject) bool {
		return s.name != onRueidis && s.name != redisRateAuto && s.name != rueidisINCR
	})
	var sets []keyset
	for _, n := range r.size.growth {
		sets = append(sets, newKeyset(n))
	}
	r.eachCount("growth", subjects, func(s subject) {
		for _, keys := range sets {
			r.visit(s, at, keys, false, []step{{work{section: "growth", keys: keys.len(), goroutines: r.size.most()}, func(ctx context.Context, l *load) (sample, error) {
				memory, err := l.memory()
				if err != nil {
					return nil, err
				}
				l.goroutines = r.size.most()
				s, err := r.warm(ctx, l)
				if err == nil {
					s[keyBytes], s[usedBytes] = memory[keyBytes], memory[usedBytes]
				}
				return s, err
			}}})
		}
	})
}

func memory(_ context.Context, l *load) (sample, error) { return l.memory() }

// closed returns a measurement for each number of goroutines.
func (r *runner) closed(w work, goroutines ...int) []step {
	return r.steps(w, []placement{anywhere}, goroutines...)
}

// placed returns a measurement for each placement and each number of goroutines, which are few.
func (r *runner) placed(w work, goroutines ...int) []step {
	return r.steps(w, r.placements, goroutines...)
}

func (r *runner) steps(w work, on []placement, goroutines ...int) (steps []step) {
	for _, w.on = range on {
		for _, g := range goroutines {
			w.goroutines = g
			steps = append(steps, step{w, func(ctx context.Context, l *load) (sample, error) {
				l.goroutines = g
				return r.warm(ctx, l)
			}})
		}
	}
	return steps
}

// warm measures a closed loop that has been running for some time.
func (r *runner) warm(ctx context.Context, l *load) (sample, error) {
	d := l.long
	if l.at == nil {
		d /= 2 // there is less that varies
	}
	if _, err := l.closedLoop(ctx, d/4); err != nil {
		return nil, err
	}
	return l.closedLoop(ctx, d)
}

// guest is a subject that is open, and whose keys are filled, or the error that prevented it.
type guest struct {
	subject
	load *load
	end  func()
	err  error
}

// open empties the target, opens subjects, and fills the keys of each, which are a part of all keys.
func (r *runner) open(subjects []subject, at *target, keys keyset, denied bool) (guests []*guest) {
	var failed error
	if at != nil {
		failed = at.flush()
	}
	for i, s := range subjects {
		if denied && s.kind == floor {
			continue
		}
		g := &guest{subject: s, err: cmp.Or(r.endless[s.name], failed)}
		if g.err == nil {
			prepared, err := bounded(r, func(ctx context.Context) (guest, error) {
				l, end, err := prepare(ctx, s, at, keys.part(i, len(subjects)), denied)
				return guest{load: l, end: end}, err
			})
			if g.load, g.end, g.err = prepared.load, prepared.end, err; err == nil {
				g.load.long = r.long
			}
		}
		guests = append(guests, g)
	}
	return guests
}

// do runs a step, and adds its result or the error that prevented it.
func (r *runner) do(g *guest, step step) {
	var got sample
	if g.load != nil && !errors.Is(g.err, errEndless) {
		got, g.err = r.pinned(step.work.on, g.load.at, func() (sample, error) {
			return bounded(r, func(ctx context.Context) (sample, error) { return step.run(ctx, g.load) })
		})
	}
	if r.ctx.Err() != nil {
		return
	}
	if g.err != nil {
		fmt.Fprintf(r.log, "FAILED: %s: %+v: %v\n", g.name, step.work, g.err)
	}
	r.results.add(step.work, g.subject, got, g.err)
	if errors.Is(g.err, errEndless) {
		r.endless[g.name] = g.err
	}
}

func (r *runner) pinned(on placement, at *target, f func() (sample, error)) (sample, error) {
	if on == anywhere {
		return f()
	}
	servers, err := at.processes()
	if err != nil {
		return nil, err
	}
	undo, err := pin(on, servers)
	if err != nil {
		return nil, err
	}
	got, err := f()
	return got, cmp.Or(err, undo())
}

func (r *runner) close(g *guest) {
	if g.end != nil {
		_, _ = bounded(r, func(context.Context) (any, error) { g.end(); return nil, nil })
	}
}

// visit opens a subject, runs the steps, and closes it.
func (r *runner) visit(s subject, at *target, keys keyset, denied bool, steps []step) {
	for _, g := range r.open([]subject{s}, at, keys, denied) {
		for _, step := range steps {
			r.do(g, step)
		}
		r.close(g)
	}
}

// turnsOfCount is how many short turns of all subjects are a count: the speed of a virtual machine changes within a second, and
// so all must come in each of them.
const turnsOfCount = 4

// turns opens all subjects at once, with as many keys of each, and runs each step with one after the other, in random order.
func (r *runner) turns(subjects []subject, at *target, w work, steps []step) {
	if len(steps) == 0 {
		return
	}
	guests := r.open(subjects, at, newKeyset(len(subjects)*w.keys), w.denied)
	for _, g := range guests {
		if g.load != nil {
			g.load.long = r.long / turnsOfCount
		}
	}
	for count := range r.counts {
		for _, step := range steps {
			fmt.Fprintf(r.log, "%s %s, count %d of %d\n", time.Now().Format(time.TimeOnly), step.work.title(), count+1, r.counts)
			for range turnsOfCount {
				for _, i := range rand.Perm(len(guests)) {
					r.do(guests[i], step)
				}
			}
		}
	}
	for _, g := range guests {
		r.close(g)
	}
}

// prepare opens a subject and fills the keys. For work that is denied this uses up their quota.
func prepare(ctx context.Context, s subject, at *target, keys keyset, denied bool) (*load, func(), error) {
	n := share
	switch {
	case denied:
		n = once
	case keys.len() == 1:
		n = plenty
	}
	l := &load{keys: keys, denied: denied, every: 32, at: at, late: 100 * time.Millisecond}
	first := 0
	if at != nil {
		l.every = 1
		// The first keys make connections and buffers, whose memory must not count as memory of keys.
		first = keys.len() / 100
	}
	var before runtime.MemStats
	if at == nil {
		before = heap()
	}
	t, end, err := s.open(n, at)
	if err != nil {
		return nil, nil, err
	}
	l.take = t
	if err := l.fill(ctx, 0, first); err != nil {
		return nil, end, err
	}
	used := 0.0
	if at != nil {
		if used, err = at.usedMemory(); err != nil {
			return nil, end, err
		}
	}
	if err := l.fill(ctx, first, keys.len()); err != nil {
		return nil, end, err
	}
	l.memory = func() (sample, error) {
		if at == nil {
			return localMemory(&before, keys.len()), nil
		}
		return redisMemory(at, used, keys.len()-first, keys.len())
	}
	return l, end, nil
}

func localMemory(before *runtime.MemStats, keys int) sample {
	after := heap()
	n := float64(keys)
	live := func(m *runtime.MemStats) float64 { return float64(m.Mallocs) - float64(m.Frees) }
	whole, pauses := collection()
	return sample{
		heapBytes: (float64(after.HeapAlloc)-float64(before.HeapAlloc))/n - float64(keyLength),
		objects:   (live(&after) - live(before)) / n,
		collect:   micros(whole) / 1000,
		pause:     micros(pauses),
	}
}

func redisMemory(at *target, before float64, added, keys int) (sample, error) {
	used, err := at.usedMemory()
	if err != nil {
		return nil, err
	}
	usage, err := at.memoryUsage(keys)
	return sample{usedBytes: (used - before) / float64(added), keyBytes: usage}, err
}

// errEndless is the error of a measurement that took longer than the limit.
var errEndless = errors.New("it came to no end")

// bounded runs f, which is given up after the limit.
func bounded[T any](r *runner, f func(ctx context.Context) (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	done := make(chan result, 1)
	go func() {
		var got result
		defer func() { done <- got }()
		defer caught(&got.err)
		got.value, got.err = f(ctx)
	}()
	select {
	case got := <-done:
		return got.value, got.err
	case <-time.After(r.limit):
	}
	cancel()
	err := fmt.Errorf("%w within %v", errEndless, r.limit)
	select {
	case got := <-done: // it heeds its context
		return got.value, err
	case <-time.After(min(r.limit, 5*time.Second)):
		var none T
		return none, err
	}
}

// results are the measurements so far, a table for each work.
type results []*table

type table struct {
	work work
	rows []*row
}

type row struct {
	subject string
	kind    kind
	samples []sample // one for each count; nil where it failed
	failed  int
	err     error // the first
}

func (r *results) table(w work) *table {
	for _, t := range *r {
		if t.work == w {
			return t
		}
	}
	return nil
}

func (r *results) add(w work, s subject, got sample, err error) {
	t := r.table(w)
	if t == nil {
		t = &table{work: w}
		*r = append(*r, t)
	}
	i := slices.IndexFunc(t.rows, func(row *row) bool { return row.subject == s.name })
	if i < 0 {
		i = len(t.rows)
		t.rows = append(t.rows, &row{subject: s.name, kind: s.kind})
	}
	row := t.rows[i]
	if err != nil {
		got = nil
		if row.failed++; row.err == nil {
			row.err = err
		}
	}
	row.samples = append(row.samples, got)
}

// of returns a metric's median, least and greatest; ok is false if it was not measured.
func (r *row) of(m metric) (median, least, greatest float64, ok bool) {
	var all []float64
	for _, s := range r.samples {
		if v, has := s[m]; has {
			all = append(all, v)
		}
	}
	if len(all) == 0 {
		return 0, 0, 0, false
	}
	slices.Sort(all)
	return middle(all), all[0], all[len(all)-1], true
}

// middle returns the median of sorted numbers.
func middle(sorted []float64) float64 {
	n := len(sorted)
	return (sorted[n/2] + sorted[(n-1)/2]) / 2
}

// beside compares a row with another one, count by count, and returns the median of the ratios.
func (r *row) beside(o *row, m metric) (ratio float64, ok bool) {
	var all []float64
	for i := range min(len(r.samples), len(o.samples)) {
		own, ok := r.samples[i][m]
		other, ok2 := o.samples[i][m]
		if ok && ok2 {
			all = append(all, m.ratio(own, other))
		}
	}
	if len(all) == 0 {
		return 0, false
	}
	slices.Sort(all)
	return middle(all), true
}
