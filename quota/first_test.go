package quota_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// oneGroup is a store that decides no more than one group in a step, or one key.
type oneGroup struct {
	quota.Store
	key   bool
	fail  error // of the nth list of one group, counted from 1
	nth   int
	lists int
}

func (s *oneGroup) Atomicity() driver.Atomicity { return driver.OneGroup }

func (s *oneGroup) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	for _, c := range cs {
		if quota.Group(c.Key) != quota.Group(cs[0].Key) || s.key && c.Key != cs[0].Key {
			return fmt.Errorf("a test: %w", quota.ErrCrossSlot)
		}
	}
	if s.lists++; s.lists == s.nth {
		return s.fail
	}
	return s.Store.ChargeAll(ctx, cs, out)
}

func (s *oneGroup) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	var out [1]quota.Decision
	err := s.ChargeAll(ctx, []quota.Charge{c}, out[:])
	return out[0], err
}

// The first list that fits is charged, and no other, in one step and in order: with every rule.
func TestTakeFirst(t *testing.T) {
	for name, apart := range map[string]bool{"one step": false, "in order": true} {
		t.Run(name, func(t *testing.T) {
			testkit.EachRule(t, 4, time.Hour, func(t *testing.T, own *quota.Limit) {
				pool := testkit.LimitOf("pool", own.Name(), 6, 2*time.Hour)
				var store quota.Store = local.New()
				if apart {
					store = &oneGroup{Store: store}
				}
				lim := newLimiter(t, store, own, nil)
				share := []quota.Charge{{Key: "a/share", Cost: 3}, {Limit: pool, Key: "a/count", Cost: 1}}
				common := []quota.Charge{{Limit: pool, Key: "b/common", Cost: 3}}
				var want []int64
				step := func(taken int, granted bool) quota.Result {
					t.Helper()
					r := must[quota.Result](t)(lim.TakeFirst(bg, share, common))
					if r.Granted != granted || r.Taken != taken || len(r.Lists) != 2 || len(r.Decisions) != len(r.Lists[taken]) {
						t.Fatalf("got %+v, want list %d, granted %v", r, taken, granted)
					}
					for i, list := range r.Lists {
						for _, d := range list {
							if (d.Charged > 0) != (granted && i == taken) || d.Split != apart {
								t.Errorf("a decision on list %d: got %v, want it charged %v, split %v", i, d, granted && i == taken, apart)
							}
						}
					}
					var left []int64
					for _, c := range append(append([]quota.Charge(nil), share...), common...) {
						c.Op = quota.OpPeek
						left = append(left, must[quota.Result](t)(lim.ChargeAll(bg, c)).Decisions[0].Remaining)
					}
					if fmt.Sprint(left) != fmt.Sprint(want) {
						t.Errorf("left of the charges' keys: got %v, want %v", left, want)
					}
					return r
				}
				want = []int64{1, 5, 6}
				first := step(0, true)
				want = []int64{1, 5, 3}
				step(1, true)
				want = []int64{1, 5, 0}
				if r := step(1, true); r.Decisions[0].Remaining != 0 || r.RetryAfter() != 0 {
					t.Errorf("the common pool: got %v, want none left", r)
				}
				r := must[quota.Result](t)(lim.TakeFirst(bg, share, common))
				if least := min(r.Lists[0][0].RetryAfter, r.Lists[1][0].RetryAfter); r.Granted || r.RetryAfter() != least || r.Lists[r.Taken][0].RetryAfter != least {
					t.Errorf("no list fits: got %+v, want the least of the waits", r)
				}
				if d := must[quota.Result](t)(lim.ChargeAll(bg, share[0].Refund(first.Decisions[0], 3))).Decisions[0]; d.Charged != -3 {
					t.Errorf("a refund of the first list's receipt: got %v, want 3 back", d)
				}
			})
		})
	}
}

// Alternatives may have keys in common, and the one that is taken is charged to them.
func TestTakeFirstOfTheSameKey(t *testing.T) {
	testkit.EachRule(t, 10, time.Hour, func(t *testing.T, l *quota.Limit) {
		lim := newLimiter(t, local.New(), l, nil)
		other := testkit.Bucket("other", 1, time.Hour)
		large := []quota.Charge{{Key: "k", Cost: 6}, {Limit: other, Key: "k", Cost: 1}}
		small := []quota.Charge{{Key: "k", Cost: 2}}
		for i, want := range []struct {
			taken int
			left  int64
		}{{0, 4}, {1, 2}, {1, 0}} {
			r := must[quota.Result](t)(lim.TakeFirst(bg, large, small))
			if !r.Granted || r.Taken != want.taken || r.Decisions[0].Remaining != want.left {
				t.Errorf("step %d: got %+v, want list %d, %d left", i, r, want.taken, want.left)
			}
			if d := must[quota.Decision](t)(lim.Peek(bg, "k", 0)); d.Remaining != want.left {
				t.Errorf("step %d: got %v, want %d left", i, d, want.left)
			}
		}
	})
}

// A repeat of an id gets the list that was granted, though another would fit now.
func TestTakeFirstRepeats(t *testing.T) {
	l, pool := testkit.Bucket("n", 10, time.Hour), testkit.Bucket("pool", 10, time.Hour)
	lim := newLimiter(t, local.New(), l, nil)
	must[quota.Decision](t)(lim.Take(bg, "g", 10))
	lists := [][]quota.Charge{{{Key: "g", Cost: 3, ID: "x"}}, {{Limit: pool, Key: "g", Cost: 3, ID: "x"}}}
	first := must[quota.Result](t)(lim.TakeFirst(bg, lists...))
	if err := lim.Reset(bg, "g"); err != nil {
		t.Fatal(err)
	}
	again := must[quota.Result](t)(lim.TakeFirst(bg, lists...))
	if first.Taken != 1 || again.Taken != 1 || !again.Granted || !again.Decisions[0].Replayed || again.Decisions[0].Remaining != 7 || again.Lists[0][0].Allowed {
		t.Errorf("a repeat: got %+v, want that of before: %+v", again, first)
	}
	if _, err := lim.TakeFirst(bg, lists[1], lists[0]); !errors.Is(err, quota.ErrInvalid) {
		t.Errorf("the id in another order: got %v, want ErrInvalid", err)
	}
}

// An id does not cover lists that are tried one after the other: the list that a repeat would try first may fit by then.
func TestTakeFirstWithIDInOrder(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Hour)
	store := &oneGroup{Store: local.New(), key: true}
	lim := newLimiter(t, store, l, nil)
	for _, keys := range [][2]string{{"a", "b"}, {"g/a", "g/b"}} {
		_, err := lim.TakeFirst(bg, []quota.Charge{{Key: keys[0], Cost: 11, ID: "x"}}, []quota.Charge{{Key: keys[1], Cost: 1, ID: "x"}})
		if !errors.Is(err, quota.ErrCrossSlot) || store.lists != 0 {
			t.Errorf("%q: got %v after %d lists, want ErrCrossSlot after none", keys, err, store.lists)
		}
	}
}

// An error ends the call: no other list is tried.
func TestTakeFirstEndsAtAnError(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Hour)
	for _, fail := range []error{quota.ErrIndeterminate, quota.ErrUnavailable} {
		store := &oneGroup{Store: local.New(), fail: fmt.Errorf("a test: %w", fail), nth: 2}
		lim := newLimiter(t, store, l, nil)
		_, err := lim.TakeFirst(bg, []quota.Charge{{Key: "a", Cost: 11}}, []quota.Charge{{Key: "b", Cost: 1}}, []quota.Charge{{Key: "c", Cost: 1}})
		if !errors.Is(err, fail) || store.lists != 2 {
			t.Errorf("got %v after %d lists, want %v after 2", err, store.lists, fail)
		}
	}
}

func TestTakeFirstIsChecked(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Hour)
	lim := newLimiter(t, local.New(), l, nil)
	one := []quota.Charge{{Key: "k", Cost: 1}}
	var many []quota.Charge
	for i := range 33 {
		many = append(many, quota.Charge{Key: fmt.Sprint(i)})
	}
	for name, c := range map[string]struct {
		lists [][]quota.Charge
		parts []string
	}{
		"no list":         {nil, []string{"number of charges", "0"}},
		"an empty list":   {[][]quota.Charge{one, {}}, []string{"number of charges of a list", "0"}},
		"66 charges":      {[][]quota.Charge{many, many}, []string{"number of charges", "66"}},
		"twice in a list": {[][]quota.Charge{{one[0], one[0]}}, []string{"second charge", `"k"`}},
		"other numbers":   {[][]quota.Charge{one, {{Limit: testkit.Bucket("n", 20, time.Hour), Key: "k", Cost: 1}}}, []string{"limit n of an alternative", "one limit of a name"}},
		"a debit":         {[][]quota.Charge{one, {{Key: "l", Cost: 1, Op: quota.OpDebit}}}, []string{"operation of an alternative", "debit"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := lim.TakeFirst(bg, c.lists...)
			testkit.WantInvalid(t, err, c.parts...)
		})
	}
	for name, numbers := range map[string][2]uint8{"not from 1": {2, 2}, "a gap": {1, 3}, "back": {2, 1}, "some none": {1, 0}, "begun late": {0, 1}} {
		t.Run(name, func(t *testing.T) {
			cs := []quota.Charge{{Limit: l, Key: "a", Alternative: numbers[0]}, {Limit: l, Key: "b", Alternative: numbers[1]}}
			testkit.WantInvalid(t, quota.Check(cs), "alternative of charge", "numbers from 1 in order")
		})
	}
	if _, err := lim.WaitAll(bg, quota.Charge{Key: "k", Cost: 1, Alternative: 1}); !errors.Is(err, quota.ErrInvalid) {
		t.Errorf("waiting for alternatives: got %v, want ErrInvalid", err)
	}
}
