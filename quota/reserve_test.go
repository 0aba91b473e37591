package quota_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quotatest"
)

const ttl = 16 * time.Second

var (
	heldTokens = quota.NewLimit("tokens", algorithm.Held(algorithm.FixedWindow(1000, 24*time.Hour), ttl))
	slots      = quota.NewLimit("slots", algorithm.Concurrency(10, ttl))
	estimated  = testkit.LimitOf("estimated", "fw1", 1000, 24*time.Hour)
)

// inBubble runs a test with a store whose time is the bubble's.
func inBubble(t *testing.T, test func(t *testing.T, s *quotatest.Store)) {
	synctest.Test(t, func(t *testing.T) { test(t, quotatest.New(t, &quotatest.Options{Clock: time.Now})) })
}

// member returns a limiter of a process of a fleet on one store. It is closed when the test ends.
func member(t testing.TB, s quota.Store, limit *quota.Limit, o *quota.Options) *quota.Limiter {
	lim := newLimiter(t, unclosed{s}, limit, o)
	t.Cleanup(func() { lim.Close() })
	return lim
}

func reserve(t *testing.T, l *quota.Limiter, cs ...quota.Charge) *quota.Reservation {
	t.Helper()
	r := must[*quota.Reservation](t)(l.Reserve(bg, cs...))
	if !r.Granted {
		t.Fatalf("reservation: got %v, want it granted", r.Result)
	}
	return r
}

// wantLeft fails unless so many tokens are left.
func wantLeft(t *testing.T, l *quota.Limiter, limit *quota.Limit, want int64, when string) {
	t.Helper()
	r := must[quota.Result](t)(l.ChargeAll(bg, quota.Charge{Limit: limit, Key: "k", Op: quota.OpPeek}))
	if got := r.Decisions[0].Remaining; got != want {
		t.Errorf("tokens of %s left %s: got %d, want %d", limit.Name(), when, got, want)
	}
}

func isLost(r *quota.Reservation) bool {
	select {
	case <-r.Lost():
		return true
	default:
		return false
	}
}

// A reservation holds its estimate where the limit has holds, and is charged it elsewhere; in the end the actual cost is
// charged, and slots are free.
func TestReserve(t *testing.T) {
	list := []quota.Charge{{Key: "k", Cost: 300}, {Limit: estimated, Key: "k", Cost: 300}, {Limit: slots, Key: "k", Cost: 1}}
	for _, end := range []struct {
		name string
		do   func(r *quota.Reservation) error
		used [2]int64 // of the held tokens, and of the estimated ones
	}{
		{"settle less", func(r *quota.Reservation) error { return r.Settle(bg, 100, 120) }, [2]int64{100, 120}},
		{"settle more", func(r *quota.Reservation) error { return r.Settle(bg, 700, 720, 5) }, [2]int64{700, 720}},
		{"settle into debt", func(r *quota.Reservation) error { return r.Settle(bg, 1200, 300) }, [2]int64{1200, 300}},
		{"settle as reserved", func(r *quota.Reservation) error { return r.Settle(bg) }, [2]int64{300, 300}},
		{"settle one", func(r *quota.Reservation) error { return r.Settle(bg, 0) }, [2]int64{0, 300}},
		{"release", func(r *quota.Reservation) error { return r.Release(bg) }, [2]int64{0, 0}},
		{"a context that has ended", func(r *quota.Reservation) error {
			ctx, cancel := context.WithCancel(bg)
			cancel()
			return r.Settle(ctx, 100, 120)
		}, [2]int64{100, 120}},
	} {
		t.Run(end.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *quotatest.Store) {
				lim := member(t, s, heldTokens, nil)
				r := reserve(t, lim, list...)
				wantLeft(t, lim, heldTokens, 700, "while it is open")
				wantLeft(t, lim, estimated, 700, "while it is open")
				wantLeft(t, lim, slots, 9, "while it is open")
				if err := end.do(r); err != nil {
					t.Fatal(err)
				}
				wantLeft(t, lim, heldTokens, 1000-end.used[0], "at the end")
				wantLeft(t, lim, estimated, 1000-end.used[1], "at the end")
				wantLeft(t, lim, slots, 10, "at the end")
				s.WantCharged(heldTokens, "k", end.used[0])
				if isLost(r) {
					t.Error("lost: got true, want false, for it was finished")
				}
				time.Sleep(3 * ttl)
				wantLeft(t, lim, heldTokens, 1000-end.used[0], "long after")
			})
		})
	}
}

// A denied list holds nothing, and its reservation may be released.
func TestReserveDenied(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		lim := member(t, s, heldTokens, nil)
		reserve(t, lim, quota.Charge{Limit: slots, Key: "k", Cost: 10})
		r := must[*quota.Reservation](t)(lim.Reserve(bg, quota.Charge{Key: "k", Cost: 300}, quota.Charge{Limit: slots, Key: "k", Cost: 1}))
		if r.Granted || r.Decider != 1 || r.RetryAfter() < ttl || r.RetryAfter() >= ttl+ttl/16 {
			t.Errorf("reservation: got %v, want a denial by the slots until their holds lapse", r.Result)
		}
		wantLeft(t, lim, heldTokens, 1000, "after a denial")
		if err := r.Release(bg); err != nil {
			t.Errorf("release: got %v, want nil", err)
		}
		testkit.WantInvalid(t, r.Settle(bg, 1), "denied")
		_, err := r.MarshalText()
		testkit.WantInvalid(t, err, "denied")
	})
}

// Wrong reservations and numbers are refused.
func TestReserveInvalid(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		lim := member(t, s, heldTokens, nil)
		for _, c := range []quota.Charge{{Key: "k", Op: quota.OpDebit}, {Key: "k", Op: quota.OpSpend}, {Key: "k", Alternative: 1}, {Key: ""}, {Key: "k", Cost: -1},
			{Limit: estimated, Key: "k", Op: quota.OpHold}} {
			_, err := lim.Reserve(bg, c)
			testkit.WantInvalid(t, err)
		}
		r := reserve(t, lim, quota.Charge{Key: "k", Cost: 1})
		testkit.WantInvalid(t, r.Settle(bg, -1), "actual cost is -1")
		testkit.WantInvalid(t, r.Settle(bg, 1, 1), "number of actual costs is 2")
		if err := r.Settle(bg, 1); err != nil {
			t.Error(err)
		}
	})
}

// TestFinishOnce: finishing has effect once, and a deferred Release has none after Settle.
func TestFinishOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		lim := member(t, s, heldTokens, nil)
		r, other := reserve(t, lim, quota.Charge{Key: "k", Cost: 100}), reserve(t, lim, quota.Charge{Key: "k", Cost: 200})
		for range 2 {
			if err := r.Settle(bg, 50); err != nil {
				t.Error(err)
			}
			if err := r.Release(bg); err != nil {
				t.Errorf("release after settle: got %v, want nil", err)
			}
		}
		testkit.WantInvalid(t, r.Settle(bg, 51), "actual costs")
		wantLeft(t, lim, heldTokens, 1000-50-200, "after settle")
		for range 2 {
			if err := other.Release(bg); err != nil {
				t.Error(err)
			}
		}
		testkit.WantInvalid(t, other.Settle(bg, 1), "released already")
		s.WantCharged(heldTokens, "k", 50)
		wantLeft(t, lim, heldTokens, 950, "at the end")
	})
}

// TestReservationIsKept: an open reservation is renewed for as long as it is open, in one call with all others of the key.
func TestReservationIsKept(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		lim := member(t, s, slots, nil)
		var open []*quota.Reservation
		for range 10 {
			open = append(open, reserve(t, lim, quota.Charge{Key: "k", Cost: 1}))
		}
		s.Forget()
		other := member(t, s, slots, nil) // another process
		for range 100 {
			time.Sleep(ttl / 10)
			if d := must[quota.Decision](t)(other.Peek(bg, "k", 1)); d.Allowed {
				t.Fatalf("a slot while all are held: got %v, want a denial", d)
			}
		}
		renewals := 0
		for _, call := range s.Calls() {
			if call.Charges[0].Op == quota.OpRenew {
				renewals++
			}
		}
		if renewals < 10 || renewals > 40 {
			t.Errorf("renewals of 10 reservations in ten ttl: got %d, want one for all, two or three times in each", renewals)
		}
		for _, r := range open {
			if isLost(r) {
				t.Error("lost: got true, want false")
			}
			if err := r.Release(bg); err != nil {
				t.Error(err)
			}
		}
		wantLeft(t, other, slots, 10, "after all were released")
	})
}

// TestNoGoroutine: a limiter has a goroutine while a reservation is open, and none before and after. The bubble fails where one
// is left.
func TestNoGoroutine(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		lim := member(t, s, slots, nil)
		for range 3 {
			r := reserve(t, lim, quota.Charge{Key: "k", Cost: 1})
			synctest.Wait()
			if got := s.Sleepers(); got != 1 {
				t.Errorf("goroutines that wait while a reservation is open: got %d, want 1", got)
			}
			if err := r.Release(bg); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if got := s.Sleepers(); got != 0 {
				t.Errorf("goroutines that wait while none is open: got %d, want 0", got)
			}
		}
		reserve(t, lim, quota.Charge{Key: "k", Cost: 1}) // Close must end its renewals
		if err := lim.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestReservationOfTheDead: the holds of a process that died lapse within ttl + ttl/16, and no earlier than ttl.
func TestReservationOfTheDead(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		dying, other := member(t, s, slots, nil), member(t, s, slots, nil)
		r := reserve(t, dying, quota.Charge{Key: "k", Cost: 10})
		time.Sleep(5 * ttl)
		dying.Close()
		if !isLost(r) {
			t.Error("lost after Close: got false, want true")
		}
		died := time.Now()
		a, err := other.Acquire(bg, "k", 10)
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(died); took < ttl/3 || took > ttl+ttl/16+time.Second {
			t.Errorf("all slots came back after %v, want %v at most, and a third of it at least", took, ttl+ttl/16)
		}
		if err := r.Settle(bg); !errors.Is(err, quota.ErrClosed) && err != nil {
			t.Errorf("settle after Close: got %v, want ErrClosed or nil", err)
		}
		if err := a.Release(bg); err != nil {
			t.Error(err)
		}
	})
}

// unclosed is a store that several limiters share, as processes share a server.
type unclosed struct{ quota.Store }

func (u unclosed) Unwrap() quota.Store { return u.Store }
func (unclosed) Close() error          { return nil }

// TestReservationIsLost: Lost is closed before a hold lapses that cannot be renewed, and when the store lost it.
func TestReservationIsLost(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		lim := member(t, s, slots, nil)
		r := reserve(t, lim, quota.Charge{Key: "k", Cost: 1})
		time.Sleep(time.Minute)
		s.Fail(quota.ErrUnavailable)
		failed := time.Now()
		<-r.Lost()
		if took := time.Since(failed); took < ttl/2 || took > ttl+ttl/16 {
			t.Errorf("lost after an outage of %v, want about %v", took, ttl)
		}
		s.Fail(nil)
		wantLeft(t, lim, slots, 10, "when it is lost")
		r = reserve(t, lim, quota.Charge{Key: "k", Cost: 1})
		if err := lim.Reset(bg, "k"); err != nil { // the store loses its state
			t.Fatal(err)
		}
		other := reserve(t, lim, quota.Charge{Limit: slots, Key: "k", Cost: 1})
		<-r.Lost()
		if err := r.Settle(bg); err != nil {
			t.Errorf("settle of a lost hold: got %v, want nil", err)
		}
		wantLeft(t, lim, slots, 9, "after the settle of a lost hold, beside another one")
		_ = other.Release(bg)
	})
}

// inPlace is a store whose answers to holds a policy makes: its source is that of all of them, and where it is FromOpen no renewal
// reaches the store.
type inPlace struct {
	quota.Store
	source atomic.Int64
}

func (s *inPlace) Charge(ctx context.Context, c quota.Charge) (d quota.Decision, err error) {
	source := quota.Source(s.source.Load())
	if source == quota.FromOpen && c.Op == quota.OpRenew {
		return quota.Decision{Allowed: true, Source: source, Capacity: c.Limit.Capacity(), Remaining: c.Limit.Capacity()}, nil
	}
	if d, err = s.Store.Charge(ctx, c); c.Op.Holds() {
		d.Source = source
	}
	return d, err
}

// A renewal that a policy granted in the store's place is none: it is repeated, and the hold is the store's until it lapses.
func TestRenewalInPlaceOfTheStore(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		p := &inPlace{Store: s}
		lim := member(t, p, slots, nil)
		r, late := reserve(t, lim, quota.Charge{Key: "k", Cost: 3}), reserve(t, lim, quota.Charge{Key: "k", Cost: 2})
		p.source.Store(int64(quota.FromOpen))
		time.Sleep(ttl * 3 / 4)
		if isLost(r) {
			t.Error("lost while the hold is there: got true, want false")
		}
		p.source.Store(int64(quota.FromStore))
		time.Sleep(5 * ttl)
		wantLeft(t, lim, slots, 5, "when the store answers again")
		if err := r.Release(bg); err != nil {
			t.Error(err)
		}
		wantLeft(t, lim, slots, 8, "after a release")
		p.source.Store(int64(quota.FromOpen))
		<-late.Lost()
		wantLeft(t, lim, slots, 10, "when the store has answered no renewal for a ttl")
	})
}

// A hold of an instance's share has no text: another process would finish another hold.
func TestNoTextOfAShare(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		p := &inPlace{Store: s}
		lim := member(t, p, slots, nil)
		text := must[[]byte](t)(reserve(t, lim, quota.Charge{Key: "k", Cost: 1}).MarshalText())
		text = []byte(strings.Replace(string(text), `"held":`, `"source":1,"held":`, 1))
		_, err := lim.Resume(bg, text)
		testkit.WantInvalid(t, err, "charge of a reservation's text")
		p.source.Store(int64(quota.FromFallback))
		if _, err := reserve(t, lim, quota.Charge{Key: "k", Cost: 1}).MarshalText(); !errors.Is(err, quota.ErrUnavailable) {
			t.Errorf("text of a hold of a share: got error %v, want ErrUnavailable", err)
		}
	})
}

// TestFrozenStore: a store that hangs for half of a ttl loses no reservation.
func TestFrozenStore(t *testing.T) {
	for i := range 8 {
		inBubble(t, func(t *testing.T, s *quotatest.Store) {
			lim := member(t, s, slots, nil)
			r := reserve(t, lim, quota.Charge{Key: "k", Cost: 10})
			time.Sleep(2*ttl + time.Duration(i)*ttl/16)
			resume := s.Hang()
			time.Sleep(ttl / 2)
			resume()
			time.Sleep(5 * ttl)
			if isLost(r) {
				t.Errorf("lost after %d sixteenths: got true, want false", i)
			}
			wantLeft(t, lim, slots, 0, "after the store hung")
			if err := r.Release(bg); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestFinishIsRepeated: a finish that the store cannot take is repeated, and charged once.
func TestFinishIsRepeated(t *testing.T) {
	for name, c := range map[string]struct {
		fault func(s *quotatest.Store)
	}{
		"refused":      {func(s *quotatest.Store) { s.FailNext(5, quota.ErrUnavailable) }},
		"lost answers": {func(s *quotatest.Store) { s.LoseNext(3) }},
		"both": {func(s *quotatest.Store) {
			s.FailNext(1, quota.ErrUnavailable)
			s.LoseNext(1)
			s.FailNext(1, quota.ErrUnavailable)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, limit := range []*quota.Limit{heldTokens, estimated} {
				inBubble(t, func(t *testing.T, s *quotatest.Store) {
					lim := member(t, s, limit, nil)
					other := reserve(t, lim, quota.Charge{Key: "k", Cost: 300})
					r := reserve(t, lim, quota.Charge{Key: "k", Cost: 300})
					c.fault(s)
					if err := r.Settle(bg, 100); !errors.Is(err, quota.ErrIndeterminate) || !strings.Contains(err.Error(), "repeats") {
						t.Errorf("settle: got %v, want ErrIndeterminate that says that it is repeated", err)
					}
					time.Sleep(ttl / 2)
					wantLeft(t, lim, limit, 1000-300-100, "after repeats")
					if err := r.Settle(bg, 100); err != nil {
						t.Errorf("second settle: got %v, want nil, the outcome of the repeats", err)
					}
					if err := other.Settle(bg, 200); err != nil {
						t.Error(err)
					}
					wantLeft(t, lim, limit, 700, "at the end")
				})
			}
		})
	}
}

// TestFinishIsGivenUp: a finish that the store cannot take before the hold lapses is told as a notice; Close tries it once more.
func TestFinishIsGivenUp(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		var mu sync.Mutex
		var notices []quota.Notice
		lim := member(t, s, heldTokens, &quota.Options{Notice: func(n quota.Notice) {
			mu.Lock()
			defer mu.Unlock()
			notices = append(notices, n)
		}})
		r := reserve(t, lim, quota.Charge{Key: "k", Cost: 300})
		s.Fail(quota.ErrUnavailable)
		if err := r.Settle(bg, 100); err == nil {
			t.Error("settle in an outage: got nil, want an error")
		}
		time.Sleep(2 * ttl)
		mu.Lock()
		if len(notices) != 1 || notices[0].Name != "unfinished" || !errors.Is(notices[0].Err, quota.ErrUnavailable) {
			t.Errorf("notices: got %v, want one of an unfinished reservation", notices)
		}
		mu.Unlock()
		s.Fail(nil)
		wantLeft(t, lim, heldTokens, 1000, "after the lapse")
		if err := r.Settle(bg, 100); err != nil { // the caller may still do it
			t.Error(err)
		}
		wantLeft(t, lim, heldTokens, 900, "after a late settle")

		r = reserve(t, lim, quota.Charge{Key: "k", Cost: 300})
		s.FailNext(1, quota.ErrUnavailable)
		if err := r.Settle(bg, 100); err == nil {
			t.Error("settle in an outage: got nil, want an error")
		}
		other := member(t, s, heldTokens, nil)
		lim2 := member(t, s, heldTokens, nil)
		r2 := reserve(t, lim2, quota.Charge{Key: "k", Cost: 300})
		s.FailNext(1, quota.ErrUnavailable)
		if err := r2.Settle(bg, 100); err == nil {
			t.Error("settle in an outage: got nil, want an error")
		}
		lim2.Close()
		time.Sleep(time.Second)
		wantLeft(t, other, heldTokens, 700, "after Close")
	})
}

// TestLateSettle: a settle after the lapse is charged, once; later than IDWindow after it is an error that says it was not.
func TestLateSettle(t *testing.T) {
	for late, want := range map[time.Duration]error{0: nil, time.Minute: nil, quota.IDWindow - 2*time.Second: nil, quota.IDWindow + 2*time.Second: quota.ErrExpired} {
		t.Run(late.String(), func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *quotatest.Store) {
				dead, lim := member(t, s, heldTokens, nil), member(t, s, heldTokens, nil)
				text := must[[]byte](t)(reserve(t, dead, quota.Charge{Key: "k", Cost: 300}).MarshalText())
				dead.Close()
				time.Sleep(ttl + ttl/16 + late)
				stranger := reserve(t, lim, quota.Charge{Key: "k", Cost: 10})
				twice := []*quota.Reservation{must[*quota.Reservation](t)(lim.Resume(bg, text)), must[*quota.Reservation](t)(lim.Resume(bg, text))}
				for _, r := range twice {
					if !isLost(r) {
						t.Error("lost after the lapse: got false, want true")
					}
					if err := r.Settle(bg, 100); !errors.Is(err, want) {
						t.Errorf("settle %v after the lapse: got %v, want %v", late, err, want)
					} else if want != nil && quota.Charged(err) != quota.NotCharged {
						t.Errorf("charged: got %v, want no", quota.Charged(err))
					}
				}
				charged := int64(100)
				if want != nil {
					charged = 0
				}
				s.WantCharged(heldTokens, "k", charged)
				wantLeft(t, lim, heldTokens, 1000-10-charged, "at the end")
				_ = stranger.Release(bg)
			})
		})
	}
}

// TestFinishOnceLater: the record of a finish lasts until no second one is accepted any more.
func TestFinishOnceLater(t *testing.T) {
	long := quota.NewLimit("tokens", algorithm.Held(algorithm.FixedWindow(1000, 24*time.Hour), 4*time.Minute))
	for _, later := range []time.Duration{time.Minute, quota.IDWindow + time.Second, quota.IDWindow + 4*time.Minute - time.Second, quota.IDWindow + 5*time.Minute} {
		inBubble(t, func(t *testing.T, s *quotatest.Store) {
			lim, other := member(t, s, long, nil), member(t, s, long, nil)
			r := reserve(t, lim, quota.Charge{Key: "k", Cost: 300})
			text := must[[]byte](t)(r.MarshalText())
			if err := r.Settle(bg, 100); err != nil {
				t.Fatal(err)
			}
			time.Sleep(later)
			again, err := other.Resume(bg, text)
			if err == nil {
				err = again.Settle(bg, 100)
			}
			want := quota.ErrInvalid
			if later > quota.IDWindow+4*time.Minute+15*time.Second {
				want = quota.ErrExpired
			}
			if !errors.Is(err, want) {
				t.Errorf("second settle %v later: got %v, want %v", later, err, want)
			}
			s.WantCharged(long, "k", 100)
			other.Close()
		})
	}
}

// lossy is a store of whose renewals one of five is answered: it loses the answers of two, and refuses two.
type lossy struct {
	quota.Store
	lost *atomic.Int64
}

func (s lossy) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if c.Op != quota.OpRenew {
		return s.Store.Charge(ctx, c)
	}
	n := s.lost.Add(1) % 5
	if n == 0 || n == 3 {
		return quota.Decision{}, quota.ErrUnavailable
	}
	d, err := s.Store.Charge(ctx, c)
	if n < 4 {
		return quota.Decision{}, quota.ErrIndeterminate
	}
	return d, err
}

func (s lossy) Unwrap() quota.Store { return s.Store }

// TestLostAnswerOfARenewal: a renewal whose answer is lost is repeated, and moves no hold of another process in the same slot. A
// finish meanwhile learns first where the hold is.
func TestLostAnswerOfARenewal(t *testing.T) {
	for end := range 16 {
		inBubble(t, func(t *testing.T, s *quotatest.Store) {
			a, b := member(t, lossy{s, new(atomic.Int64)}, slots, nil), member(t, lossy{s, new(atomic.Int64)}, slots, nil)
			ra, rb := reserve(t, a, quota.Charge{Key: "k", Cost: 3}), reserve(t, b, quota.Charge{Key: "k", Cost: 3})
			for range 50 + end {
				time.Sleep(ttl / 24)
				wantLeft(t, a, slots, 4, "while both are open")
			}
			if isLost(ra) || isLost(rb) {
				t.Errorf("lost: got %t and %t, want false", isLost(ra), isLost(rb))
			}
			_ = ra.Release(bg) // repeated, where a renewal is not known yet
			time.Sleep(ttl / 8)
			wantLeft(t, a, slots, 7, "after one was released")
			_ = rb.Release(bg)
			time.Sleep(ttl / 8)
			wantLeft(t, a, slots, 10, "after both were released")
		})
	}
}

// TestResume: a reservation goes on in other processes, which renew it and finish it once.
func TestResume(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		a, b, c := member(t, s, heldTokens, nil), member(t, s, heldTokens, nil), member(t, s, heldTokens, nil)
		stranger := reserve(t, c, quota.Charge{Key: "k", Cost: 50})
		ra := reserve(t, a, quota.Charge{Key: "k", Cost: 300}, quota.Charge{Limit: slots, Key: "k", Cost: 2}, quota.Charge{Limit: estimated, Key: "k", Cost: 30})
		time.Sleep(ttl)
		text := must[[]byte](t)(ra.MarshalText())
		time.Sleep(3 * ttl)
		rb := must[*quota.Reservation](t)(b.Resume(bg, text, slots, estimated))
		rc := must[*quota.Reservation](t)(c.Resume(bg, text, slots, estimated))
		for range 10 {
			time.Sleep(ttl / 2)
			wantLeft(t, b, heldTokens, 1000-350, "while it is open in three processes")
			wantLeft(t, b, slots, 8, "while it is open in three processes")
		}
		a.Close() // a dies
		for range 10 {
			time.Sleep(ttl / 2)
			wantLeft(t, b, heldTokens, 1000-350, "while it is open in two processes")
		}
		if isLost(rb) || isLost(rc) {
			t.Error("lost: got true, want false")
		}
		if err := rb.Settle(bg, 100, 2, 20); err != nil {
			t.Fatal(err)
		}
		if err := rc.Settle(bg, 100, 2, 20); err != nil {
			t.Errorf("the same settle elsewhere: got %v, want nil", err)
		}
		rc2, err := c.Resume(bg, text, slots, estimated)
		testkit.WantInvalid(t, err, "finished by another process")
		if rc2 != nil {
			t.Error("a finished reservation was resumed")
		}
		s.WantCharged(heldTokens, "k", 100)
		s.WantCharged(estimated, "k", 20)
		wantLeft(t, b, heldTokens, 1000-100-50, "at the end")
		wantLeft(t, b, slots, 10, "at the end")
		if isLost(stranger) {
			t.Error("the stranger's hold is lost")
		}
		if err := stranger.Release(bg); err != nil {
			t.Error(err)
		}
		wantLeft(t, b, heldTokens, 900, "at the end")
	})
}

// TestFinishElsewhere: of two different finishes one is made, and the other is told so; the reservation there is lost.
func TestFinishElsewhere(t *testing.T) {
	for _, wait := range []time.Duration{0, ttl / 2, 2 * ttl} {
		inBubble(t, func(t *testing.T, s *quotatest.Store) {
			a, b := member(t, s, heldTokens, nil), member(t, s, heldTokens, nil)
			stranger := reserve(t, b, quota.Charge{Key: "k", Cost: 50})
			ra := reserve(t, a, quota.Charge{Key: "k", Cost: 300})
			rb := must[*quota.Reservation](t)(b.Resume(bg, must[[]byte](t)(ra.MarshalText())))
			time.Sleep(wait)
			if err := rb.Settle(bg, 100); err != nil {
				t.Fatal(err)
			}
			testkit.WantInvalid(t, ra.Settle(bg, 120), "finished by another process")
			s.WantCharged(heldTokens, "k", 100)
			wantLeft(t, b, heldTokens, 1000-100-50, "at the end")

			ra = reserve(t, a, quota.Charge{Key: "k", Cost: 300})
			rb = must[*quota.Reservation](t)(b.Resume(bg, must[[]byte](t)(ra.MarshalText())))
			if err := rb.Release(bg); err != nil {
				t.Fatal(err)
			}
			<-ra.Lost() // it learns of it when it renews
			if err := ra.Release(bg); err != nil {
				t.Errorf("the same release elsewhere: got %v, want nil", err)
			}
			wantLeft(t, b, heldTokens, 1000-100-50, "at the end")
			_ = stranger.Release(bg)
		})
	}
}

// TestStaleText: a process that continues a reservation from an old text, and finishes it, does so where the hold is now.
func TestStaleText(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		a, b := member(t, s, heldTokens, nil), member(t, s, heldTokens, nil)
		ra := reserve(t, a, quota.Charge{Key: "k", Cost: 300})
		text := must[[]byte](t)(ra.MarshalText())
		rb := must[*quota.Reservation](t)(b.Resume(bg, text))
		stranger := reserve(t, b, quota.Charge{Key: "k", Cost: 300})
		time.Sleep(10 * ttl)
		s.Forget()
		for i, r := range []*quota.Reservation{rb, ra} {
			if err := r.Settle(bg, 7); err != nil {
				t.Errorf("settle %d: got %v, want nil", i, err)
			}
			wantLeft(t, b, heldTokens, 1000-300-7, fmt.Sprintf("after settle %d", i))
		}
		s.WantCharged(heldTokens, "k", 7)
		_ = stranger.Release(bg)
	})
}

// TestResumeInvalid: texts that MarshalText did not make are refused.
func TestResumeInvalid(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		lim := member(t, s, heldTokens, nil)
		r := reserve(t, lim, quota.Charge{Key: "k", Cost: 3}, quota.Charge{Limit: slots, Key: "k", Cost: 2})
		text := string(must[[]byte](t)(r.MarshalText()))
		for _, wrong := range []string{"", "{}", "[]", strings.Replace(text, `"v":1`, `"v":2`, 1), strings.Replace(text, `"key":"k"`, `"key":""`, 1),
			strings.Replace(text, `"turns":[0]`, `"turns":[]`, 1), strings.Replace(text, `"turns":[0]`, `"turns":[-1]`, 1),
			strings.Replace(text, `"held":3`, `"held":-3`, 1), strings.Replace(text, `"op":7`, `"op":4`, 1), strings.Replace(text, `"slots"`, `"other"`, 1)} {
			if wrong == text {
				t.Fatal("a text is not wrong")
			}
			_, err := lim.Resume(bg, []byte(wrong), slots)
			testkit.WantInvalid(t, err)
		}
		_, err := lim.Resume(bg, []byte(text)) // without the second limit
		testkit.WantInvalid(t, err, "slots")
		if err := r.Settle(bg, 3); err != nil {
			t.Error(err)
		}
		_, err = r.MarshalText()
		testkit.WantInvalid(t, err, "finished")
		synctest.Wait()
		if got := s.Sleepers(); got != 0 {
			t.Errorf("goroutines after all was finished: got %d, want 0", got)
		}
	})
}

// TestReserveWithID: a reservation with a request id is one, however often it is made and finished.
func TestReserveWithID(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		a, b := member(t, s, heldTokens, nil), member(t, s, heldTokens, nil)
		c := quota.Charge{Key: "k", Cost: 300, ID: "job-7"}
		ra := reserve(t, a, c)
		time.Sleep(ttl / 2)
		rb := reserve(t, b, c)
		for range 6 {
			time.Sleep(ttl / 2)
			wantLeft(t, a, heldTokens, 700, "while it is open twice")
		}
		for _, r := range []*quota.Reservation{ra, rb} {
			if err := r.Settle(bg, 100); err != nil {
				t.Error(err)
			}
		}
		s.WantCharged(heldTokens, "k", 100)
		wantLeft(t, a, heldTokens, 900, "at the end")
	})
}

// TestAcquire: callers get slots in their order: at once when one of this limiter comes back, and soon after another process
// gave one back, and never only when holds lapse. A deadline before the lapse does not end the wait early.
func TestAcquire(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		lim, other := member(t, s, slots, nil), member(t, s, slots, nil)
		a, b := reserve(t, lim, quota.Charge{Key: "k", Cost: 5}), reserve(t, other, quota.Charge{Key: "k", Cost: 5})
		var mu sync.Mutex
		var order []int
		got := make(chan *quota.Reservation, 3)
		begin := time.Now()
		for i := range 3 {
			go func() {
				ctx, cancel := context.WithTimeout(bg, ttl/2)
				defer cancel()
				r, err := lim.Acquire(ctx, "k", 5)
				if err != nil {
					t.Errorf("acquire %d after %v: %v", i, time.Since(begin), err)
				}
				mu.Lock()
				order = append(order, i)
				mu.Unlock()
				got <- r
			}()
			synctest.Wait()
		}
		time.Sleep(time.Second)
		if err := a.Release(bg); err != nil {
			t.Fatal(err)
		}
		first := <-got
		if took := time.Since(begin); took != time.Second {
			t.Errorf("a slot of this process came back after 1s, and was acquired after %v", took)
		}
		time.Sleep(time.Second)
		released := time.Now()
		if err := b.Release(bg); err != nil {
			t.Fatal(err)
		}
		second := <-got
		if took := time.Since(released); took > 300*time.Millisecond {
			t.Errorf("a slot of another process came back, and was acquired after %v", took)
		}
		if err := first.Release(bg); err != nil {
			t.Fatal(err)
		}
		third := <-got
		for _, r := range []*quota.Reservation{second, third} {
			if err := r.Release(bg); err != nil {
				t.Error(err)
			}
		}
		if fmt.Sprint(order) != "[0 1 2]" {
			t.Errorf("order: got %v, want [0 1 2]", order)
		}
		wantLeft(t, other, slots, 10, "at the end")
	})
}

// An Acquire whose context ends leaves no slot held, also where the store granted it at that moment.
func TestAcquireEnds(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		lim := member(t, s, slots, nil)
		_, err := lim.Acquire(bg, "k", 11)
		testkit.WantInvalid(t, err, "capacity")
		r := reserve(t, lim, quota.Charge{Key: "k", Cost: 10})
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		if _, err := lim.Acquire(ctx, "k", 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("acquire: got %v, want DeadlineExceeded", err)
		}
		if err := r.Release(bg); err != nil {
			t.Fatal(err)
		}
		ctx, cancel = context.WithCancel(bg)
		late := member(t, tooLate{s, cancel}, slots, nil)
		if _, err := late.Acquire(ctx, "k", 1); !errors.Is(err, context.Canceled) {
			t.Errorf("acquire: got %v, want Canceled", err)
		}
		wantLeft(t, lim, slots, 10, "at the end")
	})
}

// TestReserveInGroups: over several groups each is finished once.
func TestReserveInGroups(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		lim, other := member(t, s, heldTokens, nil), member(t, s, heldTokens, nil)
		r := reserve(t, lim, quota.Charge{Key: "k", Cost: 300}, quota.Charge{Key: "l/1", Cost: 200}, quota.Charge{Limit: slots, Key: "l/2", Cost: 1})
		text := must[[]byte](t)(r.MarshalText())
		time.Sleep(2 * ttl)
		ro := must[*quota.Reservation](t)(other.Resume(bg, text, slots))
		for _, r := range []*quota.Reservation{ro, r} {
			if err := r.Settle(bg, 30, 20); err != nil {
				t.Error(err)
			}
		}
		s.WantCharged(heldTokens, "k", 30)
		s.WantCharged(heldTokens, "l/1", 20)
		wantLeft(t, lim, heldTokens, 970, "at the end")
	})
}

// withoutIDs is a store that forgets request ids.
type withoutIDs struct{ quota.Store }

func (s withoutIDs) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	c.ID = ""
	return s.Store.Charge(ctx, c)
}

func (s withoutIDs) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	cs = append([]quota.Charge(nil), cs...)
	for i := range cs {
		cs[i].ID = ""
	}
	return s.Store.ChargeAll(ctx, cs, out)
}

func (s withoutIDs) Unwrap() quota.Store { return s.Store }

// TestOnceIsByIDs: the same steps go wrong on a store without request ids, in each of the ways that these are for: so
// the steps would show a finish or renewal that has effect twice.
func TestOnceIsByIDs(t *testing.T) {
	for name, steps := range map[string]func(t *testing.T, s *quotatest.Store, wrap func(quota.Store) quota.Store) (right bool){
		"release twice frees two": func(t *testing.T, s *quotatest.Store, wrap func(quota.Store) quota.Store) bool {
			lim, other := member(t, wrap(s), slots, nil), member(t, s, slots, nil)
			r, stranger := reserve(t, lim, quota.Charge{Key: "k", Cost: 5}), reserve(t, other, quota.Charge{Key: "k", Cost: 5})
			defer stranger.Release(bg)
			s.LoseNext(1)
			_ = r.Release(bg)
			time.Sleep(time.Second)
			return must[quota.Decision](t)(other.Peek(bg, "k", 0)).Remaining == 5
		},
		"renew twice moves another's": func(t *testing.T, s *quotatest.Store, wrap func(quota.Store) quota.Store) bool {
			lim, other := member(t, wrap(s), slots, nil), member(t, s, slots, nil)
			r := reserve(t, lim, quota.Charge{Key: "k", Cost: 5})
			reserve(t, other, quota.Charge{Key: "k", Cost: 5})
			other.Close() // its hold must lapse in time
			time.Sleep(ttl / 4)
			s.LoseNext(1)
			time.Sleep(ttl*13/16 + 2*time.Second)
			defer r.Release(bg)
			return must[quota.Decision](t)(lim.Peek(bg, "k", 0)).Remaining == 5
		},
		"spend twice after the lapse": func(t *testing.T, s *quotatest.Store, wrap func(quota.Store) quota.Store) bool {
			lim := member(t, wrap(s), heldTokens, nil)
			r := reserve(t, lim, quota.Charge{Key: "k", Cost: 5})
			s.Fail(quota.ErrUnavailable)
			time.Sleep(2 * ttl)
			s.Fail(nil)
			s.LoseNext(1)
			_ = r.Settle(bg, 5)
			_ = r.Settle(bg, 5)
			return s.Charged(heldTokens, "k") == 5 || must[quota.Decision](t)(lim.Peek(bg, "k", 0)).Remaining == 995
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *quotatest.Store) {
				if !steps(t, s, func(s quota.Store) quota.Store { return s }) {
					t.Error("steps: got a wrong end, want the right one")
				}
			})
			inBubble(t, func(t *testing.T, s *quotatest.Store) {
				if steps(t, s, func(s quota.Store) quota.Store { return withoutIDs{s} }) {
					t.Error("steps without request ids: got the right end, so they prove nothing")
				}
			})
		})
	}
}

// TestReservationsOfACrashingFleet: processes that crash at random with holds open, and lose calls, never have more than the limit
// open at once, and every slot comes back within ttl + ttl/16.
func TestReservationsOfACrashingFleet(t *testing.T) {
	for seed := range sized(5, 100) {
		synctest.Test(t, func(t *testing.T) { crashingFleet(t, random(t), seed) })
	}
}

// crash is a store whose calls fail once its process has died: those on the way may still be decided.
type crash struct {
	quota.Store
	rng  *lockedRand
	dead func() bool
}

func (s crash) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if s.dead() {
		return quota.ErrUnavailable
	}
	switch s.rng.n(20) {
	case 0:
		return quota.ErrUnavailable
	case 1: // the answer is lost
		_ = s.Store.ChargeAll(ctx, cs, out)
		return quota.ErrIndeterminate
	}
	return s.Store.ChargeAll(ctx, cs, out)
}

func (s crash) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	out := make([]quota.Decision, 1)
	err := s.ChargeAll(ctx, []quota.Charge{c}, out)
	return out[0], err
}

func (crash) Close() error { return nil }

type lockedRand struct {
	mu sync.Mutex
	*rand.Rand
}

func (r *lockedRand) n(n int) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.IntN(n)
}

func (r *lockedRand) upTo(d time.Duration) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return time.Duration(r.Int64N(int64(d)))
}

func crashingFleet(t *testing.T, random *rand.Rand, seed int) {
	rng := &lockedRand{Rand: random}
	rng.n(seed + 1)
	store := local.New()
	defer store.Close()
	var mu sync.Mutex
	open, most := 0, 0 // holds of living processes that are not lost
	count := func(n int) {
		mu.Lock()
		defer mu.Unlock()
		open += n
		most = max(most, open)
	}
	var fleet sync.WaitGroup
	for range 6 {
		fleet.Go(func() {
			for range 4 { // processes, one after the other
				process(t, store, rng, count)
			}
		})
	}
	fleet.Wait()
	if most > 10 {
		t.Errorf("slots that living processes had at once: got %d, want 10 at most", most)
	}
	if open != 0 {
		t.Errorf("slots open at the end: got %d, want 0", open)
	}
	lim := member(t, store, slots, nil)
	defer lim.Close()
	time.Sleep(ttl + ttl/16)
	wantLeft(t, lim, slots, 10, "after the last process died")
}

// process takes slots until it dies, after a random time.
func process(t *testing.T, store quota.Store, rng *lockedRand, count func(int)) {
	dies, cancel := context.WithTimeout(bg, rng.upTo(6*ttl))
	defer cancel()
	lim := member(t, crash{store, rng, func() bool { return dies.Err() != nil }}, slots, &quota.Options{Notice: func(quota.Notice) {}})
	defer lim.Close()
	var work sync.WaitGroup
	for range 4 {
		work.Go(func() {
			for dies.Err() == nil {
				n := 1 + rng.n(3)
				r, err := lim.Acquire(dies, "k", int64(n))
				if err != nil {
					time.Sleep(time.Millisecond)
					continue
				}
				count(n)
				select {
				case <-time.After(rng.upTo(3 * ttl)):
				case <-r.Lost():
				case <-dies.Done():
				}
				count(-n)
				if dies.Err() == nil {
					_ = r.Release(bg) // repeated where it fails
				}
			}
		})
	}
	work.Wait()
}
