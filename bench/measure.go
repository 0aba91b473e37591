package main

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A metric is one of the numbers that a measurement gives.
type metric string

const (
	decisions metric = "decisions/s"
	p50       metric = "p50 µs"
	p99       metric = "p99 µs"
	p999      metric = "p99.9 µs"
	allocs    metric = "allocs a decision"
	serverCPU metric = "server CPU µs a decision"
	offered   metric = "offered/s"
	heapBytes metric = "bytes a key"
	objects   metric = "objects a key"
	collect   metric = "collection ms"
	pause     metric = "pauses µs"
	usedBytes metric = "used_memory a key"
	keyBytes  metric = "MEMORY USAGE a key"
)

// sample holds the numbers of one measurement.
type sample map[metric]float64

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// A load describes how a measurement uses a subject.
type load struct {
	take       take
	keys       keyset
	goroutines int
	denied     bool
	// every is how many decisions share one look at the clock: where a decision takes less than the look, one of
	// some is timed.
	every int
	at    *target // nil for local
	long  time.Duration
	// late is how far a subject may be behind at the end of an open loop.
	late time.Duration
	// memory returns the memory that the keys take.
	memory func() (sample, error)
}

// closedLoop has every goroutine ask again as soon as it is answered, for a time.
func (l *load) closedLoop(ctx context.Context, d time.Duration) (sample, error) {
	var stop atomic.Bool
	time.AfterFunc(d, func() { stop.Store(true) })
	return l.measure(ctx, func(w *worker) {
		pick := l.keys.picker()
		for done := false; !done && w.err == nil; done = stop.Load() {
			start := time.Now()
			w.ask(ctx, l.take, pick())
			w.latencies.add(time.Since(start))
			for range l.every - 1 {
				w.ask(ctx, l.take, pick())
			}
		}
	})
}

// openLoop offers decisions at a steady rate for a time, whether or not the earlier ones are answered. A latency
// counts from when the decision was due, so that it includes the wait for a free goroutine or connection. A subject that
// did not keep the rate has no latencies: they would tell how long the measurement took.
func (l *load) openLoop(ctx context.Context, rate float64, d time.Duration) (sample, error) {
	total := int(rate * d.Seconds())
	due := make(chan time.Time, total)
	start := time.Now()
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(due)
		for i := 0; i < total && ctx.Err() == nil; nap() {
			for n := min(total, 1+int(rate*time.Since(start).Seconds())); i < n; i++ {
				due <- start.Add(time.Duration(float64(i) / rate * float64(time.Second)))
			}
		}
	}()
	s, err := l.measure(ctx, func(w *worker) {
		pick := l.keys.picker()
		for t := range due {
			if w.err == nil && ctx.Err() == nil {
				w.ask(ctx, l.take, pick())
				w.latencies.add(time.Since(t))
			}
		}
	})
	if err != nil {
		return nil, err
	}
	s[offered] = rate
	if behind := time.Duration(float64(total)/s[decisions]*float64(time.Second)) - d; behind > l.late {
		delete(s, p50)
		delete(s, p99)
		delete(s, p999)
	}
	return s, nil
}

// worker is one goroutine's part of a measurement.
type worker struct {
	asked, allowed int
	latencies      histogram
	err            error
	_              [64]byte // the next one's counters lie in another cache line
}

func (w *worker) ask(ctx context.Context, t take, key string) {
	allowed, err := t(ctx, key)
	if err != nil {
		w.err = err
		return
	}
	w.asked++
	if allowed {
		w.allowed++
	}
}

// measure runs the goroutines' work and returns its time, memory and decisions.
func (l *load) measure(ctx context.Context, work func(*worker)) (sample, error) {
	workers := make([]worker, l.goroutines)
	var before, after runtime.MemStats
	var cpu, cpuAfter time.Duration
	var err error
	if l.at != nil {
		if cpu, err = l.at.cpu(); err != nil {
			return nil, err
		}
	}
	runtime.ReadMemStats(&before)
	start := time.Now()
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() {
			w := &workers[i]
			defer caught(&w.err)
			work(w)
		})
	}
	wg.Wait()
	elapsed := time.Since(start)
	runtime.ReadMemStats(&after)
	if l.at != nil {
		if cpuAfter, err = l.at.cpu(); err != nil {
			return nil, err
		}
	}
	var all worker
	for i := range workers {
		w := &workers[i]
		if w.err != nil {
			return nil, w.err
		}
		all.asked += w.asked
		all.allowed += w.allowed
		all.latencies.merge(&w.latencies)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if wrong := all.wrong(l.denied); all.asked == 0 || wrong > all.asked/100 {
		return nil, fmt.Errorf("%d of %d decisions are wrong", wrong, all.asked)
	}
	n := float64(all.asked)
	s := sample{
		decisions: n / elapsed.Seconds(),
		p50:       micros(all.latencies.quantile(0.5)),
		p99:       micros(all.latencies.quantile(0.99)),
		p999:      micros(all.latencies.quantile(0.999)),
		allocs:    float64(after.Mallocs-before.Mallocs) / n,
	}
	if l.at != nil {
		s[serverCPU] = micros(cpuAfter-cpu) / n
	}
	return s, nil
}

func (w *worker) wrong(denied bool) int {
	if denied {
		return w.allowed
	}
	return w.asked - w.allowed
}

// fill takes a token of every key from a number on. Every key is a copy of its own, which the store may keep.
func (l *load) fill(ctx context.Context, from, to int) error {
	goroutines := 1
	if l.at != nil {
		goroutines = 256
	}
	next := atomic.Int64{}
	next.Store(int64(from))
	var wg sync.WaitGroup
	errs := make([]error, goroutines)
	for g := range errs {
		wg.Go(func() {
			defer caught(&errs[g])
			for i := int(next.Add(1)) - 1; i < to && errs[g] == nil; i = int(next.Add(1)) - 1 {
				if allowed, err := l.take(ctx, strings.Clone(l.keys.at(i))); err != nil || !allowed {
					errs[g] = fmt.Errorf("the first decision on a key: allowed: %v, error: %v", allowed, err)
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// caught makes a subject's panic an error.
func caught(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("panic: %v", p)
	}
}

// heap is the memory in use after a collection.
func heap() (m runtime.MemStats) {
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m
}

// collection measures the cost of garbage collection with the heap as it is: the time of a collection, most of
// which goes into scanning the heap, and the time of its pauses.
func collection() (whole, pauses time.Duration) {
	var before, after runtime.MemStats
	const times = 3
	runtime.ReadMemStats(&before)
	start := time.Now()
	for range times {
		runtime.GC()
	}
	whole = time.Since(start)
	runtime.ReadMemStats(&after)
	return whole / times, time.Duration(after.PauseTotalNs-before.PauseTotalNs) / times
}

// histogram counts latencies in classes that are 3 % wide.
type histogram [40 * classes]uint32

const classes = 32 // of each power of two

func (h *histogram) add(d time.Duration) {
	n := uint64(max(d, 0)) + classes
	shift := bits.Len64(n) - bits.Len64(classes) // n>>shift is classes to 2*classes-1
	i := shift*classes + int(n>>shift) - classes
	h[min(i, len(h)-1)]++
}

func (h *histogram) merge(o *histogram) {
	for i := range h {
		h[i] += o[i]
	}
}

func (h *histogram) quantile(q float64) time.Duration {
	total := uint64(0)
	for _, n := range h {
		total += uint64(n)
	}
	rank, seen := min(uint64(q*float64(total)), max(total, 1)-1), uint64(0)
	for i, n := range h {
		if seen += uint64(n); seen > rank {
			shift := i / classes
			return time.Duration((uint64(i%classes)+classes)<<shift) - classes
		}
	}
	return 0
}
