package faulttest

import (
	"context"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// stepped is a server whose clock a test moves, and a limit that a greedy caller takes all of.
type stepped struct {
	t      *testing.T
	server *redisserver.Server
	s      conn
	limit  *quota.Limit
	offset time.Duration
}

func startStepped(t *testing.T, l library, a quota.Algorithm) *stepped {
	server := redisserver.StartConfig(t, redisserver.Config{FakeTime: true})
	return &stepped{t, server, l.open(t, single(server)), quota.Must(quota.NewLimit("stepped", a)), 0}
}

// to sets the server's clock to the real time and an offset.
func (s *stepped) to(offset time.Duration) {
	s.t.Helper()
	ok(s.t, s.server.SetClock(offset))
	s.offset = offset
}

// drain takes tokens until one is denied, and returns how many it got.
func (s *stepped) drain() (n int64) {
	s.t.Helper()
	for {
		d, err := s.s.Take(bg, quota.Charge{Limit: s.limit, Key: "k", Cost: 1})
		ok(s.t, err)
		if now := time.Now().Add(s.offset); d.At.Time().Sub(now).Abs() > 10*time.Second {
			s.t.Fatalf("the decision is of %v, and the server's clock shows about %v", d.At.Time(), now)
		}
		if !d.Allowed {
			return n
		}
		n++
	}
}

// starved waits for the next grant.
func (s *stepped) starved() time.Duration {
	return until(s.t, "a grant", func() bool {
		d, err := s.s.Take(bg, quota.Charge{Limit: s.limit, Key: "k", Cost: 1})
		ok(s.t, err)
		return d.Allowed
	})
}

// TestClockStepsBucket moves the server's clock under a token bucket of 100 that fills in ten seconds.
func TestClockStepsBucket(t *testing.T) {
	redisserver.RequireFakeTime(t)
	eachLibrary(t, func(t *testing.T, l library) {
		const burst, rate = 100, 10
		s := startStepped(t, l, quota.Must(algorithm.TokenBucket(burst, rate, time.Second)))
		start := time.Now()
		refill := func() int64 { return int64(time.Since(start).Seconds()*rate) + 1 }
		total := s.drain()
		if most := burst + refill(); total > most {
			t.Errorf("fresh: %d admitted; accepted: %d", total, most)
		}
		// Forward: min(burst, rate times step) too much, each time.
		allowed := int64(burst)
		for _, step := range []time.Duration{time.Second, 5 * time.Second, time.Hour, 24 * time.Hour} {
			s.to(s.offset + step)
			n := s.drain()
			total += n
			allowed += min(burst, int64(step.Seconds()*rate))
			t.Logf("%v forward: %d admitted", step, n)
		}
		if most := allowed + refill(); total > most {
			t.Errorf("after steps forward: %d admitted; accepted: %d", total, most)
		}
		// Back: nothing too much, and a wait of a second and the refill of one token.
		for _, step := range []time.Duration{500 * time.Millisecond, time.Minute, 20 * time.Hour} {
			s.to(s.offset - step)
			total += s.drain()
			waited := s.starved()
			total++
			t.Logf("%v back: starved for %v", step, waited)
			if waited > 1200*time.Millisecond+2*time.Second { // of which two for a loaded machine
				t.Errorf("%v back: starved for %v", step, waited)
			}
		}
		if most := allowed + refill(); total > most {
			t.Errorf("after steps back: %d admitted; accepted: %d", total, most)
		}
		// To and fro.
		for i := range sized(10, 100) {
			step := time.Duration(2*(i%2)-1) * 3 * time.Second
			s.to(s.offset + step)
			total += s.drain()
			allowed += max(0, int64(step.Seconds()*rate))
		}
		if most := allowed + refill(); total > most {
			t.Errorf("after flapping: %d admitted; accepted: %d", total, most)
		}
		t.Logf("%d admitted; accepted: %d", total, allowed+refill())
	})
}

// TestClockStepsWindows moves the server's clock under windows: a step forward is worth one limit.
func TestClockStepsWindows(t *testing.T) {
	redisserver.RequireFakeTime(t)
	const limit, window = 20, time.Minute
	eachLibrary(t, func(t *testing.T, l library) {
		for name, make := range map[string]func(int64, time.Duration) (quota.Algorithm, error){
			"fixed": algorithm.FixedWindow, "first": algorithm.FixedWindowFromFirst, "counter": algorithm.SlidingWindow, "log": algorithm.SlidingWindowLog,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				start := time.Now()
				s := startStepped(t, l, quota.Must(make(limit, window)))
				total, allowed := s.drain(), int64(limit)
				for i := range sized(8, 40) {
					step := []time.Duration{10 * time.Second, -30 * time.Second, time.Hour, -time.Hour}[i%4]
					s.to(s.offset + step)
					n := s.drain()
					total += n
					if allowed += limit; step < 0 {
						allowed -= limit
						// An aligned window may end in the real time that passes, and a counter moves on by it.
						if slack := limit * (2 + int64(time.Since(start)/window)); n > slack {
							t.Errorf("%v: %d admitted", step, n)
						}
					}
				}
				allowed += limit * (1 + int64(time.Since(start)/window)) // windows that ended in real time
				t.Logf("%d admitted; accepted: %d", total, allowed)
				if total > allowed {
					t.Errorf("%d admitted; accepted: %d", total, allowed)
				}
				// A clock that went back an hour starves nobody for longer than a second and two windows.
				const short = time.Second
				s.limit = quota.Must(quota.NewLimit("short", quota.Must(make(limit, short))))
				s.to(s.offset + time.Hour)
				s.drain()
				s.to(s.offset - time.Hour)
				s.drain()
				waited := s.starved()
				t.Logf("starved for %v", waited)
				if waited > time.Second+2*short+2*time.Second { // of which two for a loaded machine
					t.Errorf("starved for %v", waited)
				}
			})
		}
	})
}

// recorder is an engine.Client that keeps what it is to send.
type recorder struct {
	mu   sync.Mutex
	sent [][]string
}

func (r *recorder) Do(_ context.Context, args []any, _ int) (engine.Reply, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var texts []string
	for _, a := range args {
		texts = append(texts, a.(string))
	}
	r.sent = append(r.sent, texts)
	return answer{-1, "", ""}, nil
}

func (r *recorder) Info(context.Context) ([]string, error) { return nil, nil }
func (r *recorder) Close() error                           { return nil }

type answer []any

func (a answer) Len() int                  { return len(a) }
func (a answer) Int(i int) (int64, bool)   { n, ok := a[i].(int); return int64(n), ok }
func (a answer) Text(i int) (string, bool) { s, ok := a[i].(string); return s, ok }

// TestNoClientClock shows that a process's own clock cannot reach a decision: what calls send holds no
// time, whenever they are made.
func TestNoClientClock(t *testing.T) {
	t.Parallel()
	sent := func() [][]string {
		r := &recorder{}
		s, err := engine.New(r, false, engine.Options{})
		ok(t, err)
		for _, a := range []quota.Algorithm{
			quota.Must(algorithm.TokenBucket(100, 10, time.Second)), quota.Must(algorithm.FixedWindow(5, time.Minute)),
			quota.Must(algorithm.SlidingWindow(5, time.Minute)), quota.Must(algorithm.SlidingWindowLog(5, time.Minute)),
			plain{quota.Must(algorithm.FixedWindow(5, time.Minute))},
		} {
			limit := quota.Must(quota.NewLimit("l", a))
			for op := quota.OpTake; op <= quota.OpReset; op++ {
				// The recorder's answers are short of what some calls want; what was sent is all that counts.
				s.Take(bg, quota.Charge{Limit: limit, Key: "k", Cost: 1, Op: op})
				s.Take(bg, quota.Charge{Limit: limit, Key: "k", Cost: 1, Op: op, ID: "id"})
			}
		}
		return r.sent
	}
	first := sent()
	time.Sleep(5 * time.Millisecond)
	second := sent()
	if len(first) < 40 || len(first) != len(second) {
		t.Fatalf("%d and %d calls were sent", len(first), len(second))
	}
	for i := range first {
		for j, a := range first[i] {
			if a != second[i][j] {
				t.Errorf("argument %d of a call is %q, and the same call a moment later sends %q", j, a, second[i][j])
			}
			n, _ := strconv.ParseFloat(a, 64)
			for _, unit := range []float64{1, 1e3, 1e6, 1e9} {
				if now := float64(time.Now().UnixNano()) / unit; n > 0.9*now && n < 1.1*now {
					t.Errorf("argument %d is %s, which may be a time", j, a)
				}
			}
		}
	}
}
