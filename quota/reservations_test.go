package quota_test

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quotatest"
)

// TestReservations: each reservation is counted as what became of it, once.
func TestReservations(t *testing.T) {
	inBubble(t, func(t *testing.T, s *quotatest.Store) {
		lim := member(t, s, slots, &quota.Options{Notice: func(quota.Notice) {}})
		want := func(when, want string) {
			t.Helper()
			synctest.Wait()
			n := lim.Reservations()
			if got := fmt.Sprintf("%d open, %d owed, %d settled, %d released, %d lost, %d lapsed", n.Open, n.Owed, n.Settled, n.Released, n.Lost, n.Lapsed); got != want {
				t.Errorf("reservations %s: got %s, want %s", when, got, want)
			}
		}
		one := quota.Charge{Key: "k", Cost: 1}
		var all []*quota.Reservation
		for range 7 {
			all = append(all, reserve(t, lim, one))
		}
		if r := must[*quota.Reservation](t)(lim.Reserve(bg, quota.Charge{Key: "k", Cost: 9})); r.Granted || r.Release(bg) != nil {
			t.Errorf("a reservation of too much: got %v, want it denied, and nothing to release", r.Result)
		}
		want("when they are made", "7 open, 0 owed, 0 settled, 0 released, 0 lost, 0 lapsed")
		for range 2 {
			if err := errors.Join(all[0].Settle(bg), all[0].Release(bg), all[1].Release(bg)); err != nil {
				t.Error(err)
			}
		}
		want("when two were finished twice", "5 open, 0 owed, 1 settled, 1 released, 0 lost, 0 lapsed")

		s.Fail(quota.ErrUnavailable)
		for range 2 {
			if err := all[2].Settle(bg); !errors.Is(err, quota.ErrIndeterminate) {
				t.Errorf("settle in an outage: got %v, want ErrIndeterminate", err)
			}
		}
		want("in an outage", "4 open, 1 owed, 1 settled, 1 released, 0 lost, 0 lapsed")
		s.Fail(nil)
		time.Sleep(2 * time.Second)
		want("after the outage", "4 open, 0 owed, 2 settled, 1 released, 0 lost, 0 lapsed")

		text := must[[]byte](t)(all[3].MarshalText())
		other := member(t, s, slots, nil)
		resumed := must[*quota.Reservation](t)(other.Resume(bg, text))
		if n := other.Reservations(); n.Open != 1 {
			t.Errorf("open reservations where one was resumed: got %d, want 1", n.Open)
		}
		if err := resumed.Settle(bg); err != nil {
			t.Error(err)
		}
		if n := other.Reservations(); n.Open != 0 || n.Settled != 1 {
			t.Errorf("reservations where a resumed one was settled: got %d open and %d settled, want 0 and 1", n.Open, n.Settled)
		}
		<-all[3].Lost()
		if _, err := other.Resume(bg, text); !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("resume of a settled reservation: got %v, want ErrInvalid", err)
		}
		if n := other.Reservations(); n.Open != 0 || n.Lost != 0 {
			t.Errorf("reservations after one could not be resumed: got %d open and %d lost, want none", n.Open, n.Lost)
		}
		want("when another process settled one", "4 open, 0 owed, 2 settled, 1 released, 1 lost, 0 lapsed")

		s.Fail(quota.ErrUnavailable)
		if err := all[4].Release(bg); !errors.Is(err, quota.ErrIndeterminate) {
			t.Errorf("release in an outage: got %v, want ErrIndeterminate", err)
		}
		time.Sleep(2 * ttl)
		want("after an outage longer than the ttl", "3 open, 0 owed, 2 settled, 1 released, 3 lost, 1 lapsed")
		s.Fail(nil)
		if err := all[5].Settle(bg); err != nil {
			t.Error(err)
		}
		want("after the settle of a lost one", "2 open, 0 owed, 3 settled, 1 released, 3 lost, 1 lapsed")
	})
}
