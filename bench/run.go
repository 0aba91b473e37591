package main

import (
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
	section    string // "local", "memory", "http", "redis", "redis memory", "benchmark", "cluster", "latency", "growth" or "postgres"
	keys       int
	denied     bool
	goroutines int
}

// size says how much there is to do.
type size struct {
	local, redis, postgres int // keys
	growth                 []int
	goroutines             [4]int
	benchmark              int // commands of redis-benchmark
}

// many and most are the numbers of goroutines of tables that come with fewer than all.
func (s *size) many() int { return s.goroutines[2] }
func (s *size) most() int { return s.goroutines[3] }

var (
	full = size{local: 1_000_000, redis: 100_000, postgres: 10_000, growth: []int{1000, 10_000, 100_000, 1_000_000},
		goroutines: [...]int{1, 2, 64, 256}, benchmark: 300_000}
	small = size{local: 1000, redis: 500, postgres: 100, growth: []int{100, 1000}, goroutines: [...]int{1, 2, 8, 32}, benchmark: 1000}
)

// runner does the measurements.
type runner struct {
	ctx     context.Context
	log     io.Writer
	counts  int
	long    time.Duration // of one measurement
	limit   time.Duration
	size    size
	results results
	missed  []string
	endless map[string]error // the subjects that were given up
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
			r.visit(s, nil, one, denied, r.closed("local", one, denied, r.size.goroutines[:]))
			steps := r.closed("local", all, denied, r.size.goroutines[:])
			if !denied {
				steps = append([]step{{work{section: "memory", keys: all.len()}, memory}}, steps...)
			}
			r.visit(s, nil, all, denied, steps)
		}
	})
}

func (r *runner) redis(at *target) {
	one, all := newKeyset(1), newKeyset(r.size.redis)
	r.eachCount("redis", redisSubjects, func(s subject) {
		for _, denied := range []bool{false, true} {
			goroutines := r.size.goroutines[:]
			if denied {
				goroutines = []int{1, r.size.most()}
			}
			r.visit(s, at, one, denied, r.closed("redis", one, denied, goroutines))
			steps := r.closed("redis", all, denied, goroutines)
			if !denied {
				steps = append([]step{{work{section: "redis memory", keys: all.len()}, memory}}, steps...)
			}
			r.visit(s, at, all, denied, steps)
		}
	})
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
	one, all := newKeyset(1), newKeyset(r.size.redis)
	floorOnce := slices.DeleteFunc(slices.Clone(redisSubjects), func(s subject) bool { return s.kind == floor && s.name != rueidisINCR })
	r.eachCount("cluster", floorOnce, func(s subject) {
		r.visit(s, at, one, false, r.closed("cluster", one, false, []int{r.size.most()}))
		r.visit(s, at, all, false, r.closed("cluster", all, false, []int{1, r.size.many(), r.size.most()}))
	})
}

// postgres measures few keys: what is compared is the work of a decision. Beside it comes this library on Redis, if
// that is there.
func (r *runner) postgres(at, redis *target) {
	one, all := newKeyset(1), newKeyset(r.size.postgres)
	subjects := slices.Clone(postgresSubjects)
	if redis != nil {
		subjects = append(subjects, redisSubjects[0])
	}
	goroutines := []int{1, r.size.many()}
	r.eachCount("postgres", subjects, func(s subject) {
		to := at
		if s.name == redisSubjects[0].name {
			to = redis
		}
		r.visit(s, to, one, false, r.closed("postgres", one, false, goroutines))
		r.visit(s, to, all, false, r.closed("postgres", all, false, goroutines))
		r.visit(s, to, one, true, r.closed("postgres", one, true, goroutines))
	})
}

// latency offers each subject decisions at 70 % of the peak rate that it just showed.
func (r *runner) latency(at *target) {
	all := newKeyset(r.size.redis)
	// Leases are left out: one decision takes less time than the two readings of the clock around it.
	subjects := slices.DeleteFunc(slices.Clone(redisSubjects), func(s subject) bool { return s.kind == floor || s.kind == leased })
	r.eachCount("latency", subjects, func(s subject) {
		r.visit(s, at, all, false, []step{{work{section: "latency", keys: all.len(), goroutines: r.size.most()}, func(ctx context.Context, l *load) (sample, error) {
			l.goroutines = r.size.most()
			peak, err := r.warm(ctx, l)
			if err != nil {
				return nil, err
			}
			return l.openLoop(ctx, 0.7*peak[decisions], 3*r.long)
		}}})
	})
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
func (r *runner) closed(section string, keys keyset, denied bool, goroutines []int) (steps []step) {
	for _, g := range goroutines {
		steps = append(steps, step{work{section, keys.len(), denied, g}, func(ctx context.Context, l *load) (sample, error) {
			l.goroutines = g
			return r.warm(ctx, l)
		}})
	}
	return steps
}

// warm measures a closed loop that has been running for some time.
func (r *runner) warm(ctx context.Context, l *load) (sample, error) {
	d := r.long
	if l.at == nil {
		d /= 2 // there is less that varies
	}
	if _, err := l.closedLoop(ctx, d/4); err != nil {
		return nil, err
	}
	return l.closedLoop(ctx, d)
}

// visit opens a subject, fills the keys, and runs the steps. A failure is the result of all steps it prevents.
func (r *runner) visit(s subject, at *target, keys keyset, denied bool, steps []step) {
	if denied && s.kind == floor {
		return
	}
	type prepared struct {
		load *load
		end  func()
	}
	var p prepared
	err := r.endless[s.name]
	if err == nil {
		p, err = bounded(r, func(ctx context.Context) (prepared, error) {
			l, end, err := prepare(ctx, s, at, keys, denied)
			return prepared{l, end}, err
		})
	}
	if p.end != nil {
		defer func() { _, _ = bounded(r, func(context.Context) (any, error) { p.end(); return nil, nil }) }()
	}
	for _, step := range steps {
		var got sample
		if p.load != nil && !errors.Is(err, errEndless) {
			got, err = bounded(r, func(ctx context.Context) (sample, error) { return step.run(ctx, p.load) })
		}
		if r.ctx.Err() != nil {
			return
		}
		if err != nil {
			fmt.Fprintf(r.log, "FAILED: %s: %+v: %v\n", s.name, step.work, err)
		}
		r.results.add(step.work, s, got, err)
	}
	if errors.Is(err, errEndless) {
		r.endless[s.name] = err
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
	l := &load{keys: keys, denied: denied, every: 32, at: at}
	first := 0
	if at != nil {
		l.every = 1
		// The first keys make connections and buffers, whose memory must not count as memory of keys.
		first = keys.len() / 100
		if err := at.flush(); err != nil {
			return nil, nil, err
		}
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
	samples []sample
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
	if err == nil {
		row.samples = append(row.samples, got)
		return
	}
	if row.failed++; row.err == nil {
		row.err = err
	}
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
	middle := len(all) / 2
	median = all[middle]
	if len(all)%2 == 0 {
		median = (median + all[middle-1]) / 2
	}
	return median, all[0], all[len(all)-1], true
}
