package clienttest

import (
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
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
	return &stepped{t, server, l.dial(t, single(server)), limitOf("stepped", a), 0}
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
		d, err := s.s.Charge(bg, quota.Charge{Limit: s.limit, Key: "k", Cost: 1})
		ok(s.t, err)
		if now := time.Now().Add(s.offset); d.At.Time().Sub(now).Abs() > 10*time.Second {
			s.t.Fatalf("time of a decision: got %v, want about %v, which the server's clock shows", d.At.Time(), now)
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
		d, err := s.s.Charge(bg, quota.Charge{Limit: s.limit, Key: "k", Cost: 1})
		ok(s.t, err)
		return d.Allowed
	})
}

// clockStepsBucket moves the server's clock under a token bucket of 100 that fills in ten seconds.
func clockStepsBucket(t *testing.T, l library) {
	t.Parallel()
	const burst, rate = 100, 10
	s := startStepped(t, l, algorithm.TokenBucket(burst, rate, time.Second))
	start := time.Now()
	refill := func() int64 { return int64(time.Since(start).Seconds()*rate) + 1 }
	total := s.drain()
	if most := burst + refill(); total > most {
		t.Errorf("fresh: got %d admitted, want at most %d", total, most)
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
		t.Errorf("after steps forward: got %d admitted, want at most %d", total, most)
	}
	// Back: no token too much, and a wait of a second and the refill of one token.
	for _, step := range []time.Duration{500 * time.Millisecond, time.Minute, 20 * time.Hour} {
		s.to(s.offset - step)
		total += s.drain()
		waited := s.starved()
		total++
		t.Logf("%v back: starved for %v", step, waited)
		if waited > 1200*time.Millisecond+2*time.Second { // of which two for a loaded machine
			t.Errorf("%v back: got no grant for %v, want a second and the refill of one token", step, waited)
		}
	}
	if most := allowed + refill(); total > most {
		t.Errorf("after steps back: got %d admitted, want at most %d", total, most)
	}
	// To and fro.
	for i := range sized(10, 100) {
		step := time.Duration(2*(i%2)-1) * 3 * time.Second
		s.to(s.offset + step)
		total += s.drain()
		allowed += max(0, int64(step.Seconds()*rate))
	}
	if most := allowed + refill(); total > most {
		t.Errorf("after flapping: got %d admitted, want at most %d", total, most)
	}
	t.Logf("%d admitted; accepted: %d", total, allowed+refill())
}

// clockStepsWindows moves the server's clock under windows: a step forward is worth one limit.
func clockStepsWindows(t *testing.T, l library) {
	t.Parallel()
	const limit, window = 20, time.Minute
	for name, make := range map[string]func(int64, time.Duration) quota.Algorithm{
		"fixed": algorithm.FixedWindow, "first": algorithm.FixedWindowFromFirst, "counter": algorithm.SlidingWindow, "log": algorithm.SlidingWindowLog,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			start := time.Now()
			s := startStepped(t, l, make(limit, window))
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
						t.Errorf("%v: got %d admitted, want at most %d", step, n, slack)
					}
				}
			}
			allowed += limit * (1 + int64(time.Since(start)/window)) // windows that ended in real time
			t.Logf("%d admitted; accepted: %d", total, allowed)
			if total > allowed {
				t.Errorf("got %d admitted, want at most %d", total, allowed)
			}
			// A clock that went back an hour starves a caller for a second and two windows at most.
			const short = time.Second
			s.limit = limitOf("short", make(limit, short))
			s.to(s.offset + time.Hour)
			s.drain()
			s.to(s.offset - time.Hour)
			s.drain()
			waited := s.starved()
			t.Logf("starved for %v", waited)
			if waited > time.Second+2*short+2*time.Second { // of which two for a loaded machine
				t.Errorf("got no grant for %v, want one within %v", waited, time.Second+2*short)
			}
		})
	}
}
