package quota_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

// doors are the two ways to correct a receipt of a charge of the limiter's own limit.
var doors = map[string]struct {
	refund, settle func(lim *quota.Limiter, ctx context.Context, key string, d quota.Decision, n int64) (quota.Decision, error)
}{
	"method": {(*quota.Limiter).Refund, (*quota.Limiter).Settle},
	"list": {
		func(lim *quota.Limiter, ctx context.Context, key string, d quota.Decision, n int64) (quota.Decision, error) {
			return one(lim.ChargeAll(ctx, quota.Charge{Key: key}.Refund(d, n)))
		},
		func(lim *quota.Limiter, ctx context.Context, key string, d quota.Decision, n int64) (quota.Decision, error) {
			return one(lim.ChargeAll(ctx, quota.Charge{Key: key}.Settle(d, n)))
		},
	},
}

func one(r quota.Result, err error) (quota.Decision, error) {
	if err != nil {
		return quota.Decision{}, err
	}
	return r.Decisions[0], nil
}

func eachDoor(t *testing.T, test func(t *testing.T, door string)) {
	for door := range doors {
		t.Run(door, func(t *testing.T) { test(t, door) })
	}
}

// Both doors refuse corrections that a receipt does not allow, before the store is asked.
func TestReceiptChecks(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		lim := newLimiter(t, local.New(), testkit.Bucket("n", 10, time.Hour), nil)
		d := must[quota.Decision](t)(lim.Take(bg, "k", 5))
		denial := must[quota.Decision](t)(lim.Take(bg, "k", 6))
		back := must[quota.Decision](t)(lim.Refund(bg, "k", must[quota.Decision](t)(lim.Take(bg, "k", 1)), 1))
		refund, settle := doors[door].refund, doors[door].settle
		refuse := func(name string, call func(*quota.Limiter, context.Context, string, quota.Decision, int64) (quota.Decision, error), key string, d quota.Decision, n int64, says ...string) {
			t.Helper()
			_, err := call(lim, bg, key, d, n)
			testkit.WantInvalid(t, err, says...)
			if left := must[quota.Decision](t)(lim.Peek(bg, key, 0)).Remaining; key == "k" && left != 5 {
				t.Errorf("%s: remaining: got %d, want 5 as before", name, left)
			}
		}
		refuse("refund above the receipt", refund, "k", d, 6, "refund", "6")
		refuse("negative refund", refund, "k", d, -1, "-1")
		refuse("negative actual cost", settle, "k", d, -1, "-1")
		refuse("settle of a denial", settle, "k", denial, 7, "receipt", "denial")
		refuse("refund of a denial", refund, "k", denial, 0, "receipt", "denial")
		refuse("settle of a refund", settle, "k", back, 0, "receipt", "refund")
		refuse("another key", settle, "other", d, 0, "receipt", "another limit or key")
		refuse("another key, a debit", settle, "other", d, 9, "receipt", "another limit or key")
	})
	lim := newLimiter(t, local.New(), testkit.Bucket("n", 10, time.Hour), nil)
	d := must[quota.Decision](t)(lim.Take(bg, "k", 5))
	_, err := lim.ChargeAll(bg, quota.Charge{Limit: testkit.Bucket("m", 10, time.Hour), Key: "k"}.Settle(d, 3))
	testkit.WantInvalid(t, err, "receipt", "another limit or key", `"m: `)
}

// A receipt is of the limit that LimitFor chose for its key, by either door.
// A receipt is refused for every key that differs in a byte or in its length.
func TestReceiptOfASimilarKey(t *testing.T) {
	lim := newLimiter(t, local.New(), testkit.Bucket("n", 10, time.Hour), nil)
	const long = "team-7/agent-0000042"
	for n := 1; n <= len(long); n++ {
		key := strings.TrimSuffix(long[:n], "/") + "k"
		d := must[quota.Decision](t)(lim.Take(bg, key, 5))
		others := []string{key + "\x00", "\x00" + key, key + key}
		if n >= 16 {
			others = append(others, key[8:16]+key[:8]+key[16:])
		}
		for i := range key {
			b := []byte(key)
			b[i]++
			others = append(others, string(b))
		}
		for _, other := range others {
			if _, err := lim.Settle(bg, other, d, 1); !errors.Is(err, quota.ErrInvalid) {
				t.Errorf("settle of %q by the receipt of %q: got %v, want ErrInvalid", other, key, err)
			}
		}
		if d, err := lim.Settle(bg, key, d, 1); err != nil || d.Charged != -4 {
			t.Errorf("settle of %q: got %v, %v, want 4 given back", key, d, err)
		}
	}
}

func TestReceiptOfAChosenLimit(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		plan := testkit.Bucket("plan", 20, time.Hour)
		lim := newLimiter(t, local.New(), testkit.Bucket("n", 10, time.Hour), &quota.Options{LimitFor: func(string) *quota.Limit { return plan }})
		d := must[quota.Decision](t)(lim.Take(bg, "k", 5))
		if got, err := doors[door].settle(lim, bg, "k", d, 2); err != nil || got.Remaining != 18 {
			t.Errorf("settle: got %v, %v, want 18 remaining", got, err)
		}
		plan = testkit.Bucket("other", 20, time.Hour)
		_, err := doors[door].settle(lim, bg, "k", d, 2)
		testkit.WantInvalid(t, err, "receipt", "another limit or key", `"other: `)
	})
}

// A second correction of a receipt is not made: the same one gets the first answer, another one an error.
func TestReceiptIsGoodOnce(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		c := testkit.NewClock()
		lim := newLimiter(t, quota.Must(local.NewWithOptions(local.Options{Clock: c.Time})), testkit.Bucket("n", 10, time.Hour), nil)
		take := func() quota.Decision { return must[quota.Decision](t)(lim.Take(bg, "k", 4)) }
		first, second := take(), take() // of one time: their serials tell them apart
		refund, settle := doors[door].refund, doors[door].settle
		made := must[quota.Decision](t)(settle(lim, bg, "k", first, 1))
		again := must[quota.Decision](t)(settle(lim, bg, "k", first, 1))
		if !again.Replayed || again.Remaining != made.Remaining || again.Charged != -3 {
			t.Errorf("second settle: got %v, want the first answer again, %v", again, made)
		}
		for name, call := range map[string]func() (quota.Decision, error){
			"another cost":    func() (quota.Decision, error) { return settle(lim, bg, "k", first, 0) },
			"a debit":         func() (quota.Decision, error) { return settle(lim, bg, "k", first, 9) },
			"refund":          func() (quota.Decision, error) { return refund(lim, bg, "k", first, 4) },
			"the other door":  func() (quota.Decision, error) { return lim.Refund(bg, "k", first, 4) },
			"the other door2": func() (quota.Decision, error) { return one(lim.ChargeAll(bg, quota.Charge{Key: "k"}.Refund(first, 4))) },
			"in a list": func() (quota.Decision, error) {
				return one(lim.ChargeAll(bg, quota.Charge{Key: "other", Cost: 1}, quota.Charge{Key: "k"}.Settle(first, 1)))
			},
		} {
			_, err := call()
			testkit.WantInvalid(t, err, "receipt", "corrected already")
			if left := must[quota.Decision](t)(lim.Peek(bg, "k", 0)).Remaining; left != 5 {
				t.Errorf("%s: remaining: got %d, want 5", name, left)
			}
		}
		if d := must[quota.Decision](t)(settle(lim, bg, "k", second, 1)); d.Replayed || d.Remaining != 8 {
			t.Errorf("settle of the other receipt: got %v, want 8 remaining", d)
		}
		if left := must[quota.Decision](t)(lim.Peek(bg, "other", 0)).Remaining; left != 10 {
			t.Errorf("key of the refused list: got %d remaining, want 10", left)
		}
	})
}

// failing is a store that fails the next corrections with some errors, and says whether it was asked.
type failing struct {
	quota.Store
	errs  []error
	asked int
	wait  chan struct{}
}

func (f *failing) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if c.Op != quota.OpRefund {
		return f.Store.Charge(ctx, c)
	}
	f.asked++
	if f.wait != nil {
		<-f.wait
	}
	if err := ctx.Err(); err != nil {
		return quota.Decision{}, err
	}
	if len(f.errs) > 0 {
		err := f.errs[0]
		f.errs = f.errs[1:]
		if err == errBoom {
			panic(err)
		}
		return quota.Decision{}, err
	}
	return f.Store.Charge(ctx, c)
}

var errBoom = errors.New("boom")

// A correction that was certainly not made may be repeated, and one of unknown outcome may not.
func TestReceiptAfterErrors(t *testing.T) {
	for _, err := range []error{quota.ErrUnavailable, quota.ErrOverloaded, quota.ErrMisconfigured, context.DeadlineExceeded} {
		f := &failing{Store: local.New(), errs: []error{err}}
		lim := newLimiter(t, f, testkit.Bucket("n", 10, time.Hour), nil)
		d := must[quota.Decision](t)(lim.Take(bg, "k", 5))
		if _, got := lim.Settle(bg, "k", d, 1); !errors.Is(got, err) {
			t.Errorf("settle: got %v, want %v", got, err)
		}
		if got := must[quota.Decision](t)(lim.Settle(bg, "k", d, 0)); got.Replayed || got.Remaining != 10 {
			t.Errorf("settle after %v: got %v, want it made, 10 remaining", err, got)
		}
	}
	f := &failing{Store: local.New(), errs: []error{quota.ErrIndeterminate, errBoom}}
	lim := newLimiter(t, f, testkit.Bucket("n", 10, time.Hour), nil)
	for range 2 {
		d := must[quota.Decision](t)(lim.Take(bg, "k", 5))
		asked := f.asked
		for range 2 {
			func() {
				defer func() { recover() }()
				if _, got := lim.Settle(bg, "k", d, 1); !errors.Is(got, quota.ErrIndeterminate) {
					t.Errorf("settle: got %v, want %v", got, quota.ErrIndeterminate)
				}
			}()
		}
		if f.asked != asked+1 {
			t.Errorf("requests to the store: got %d, want 1", f.asked-asked)
		}
	}
}

// Corrections of one receipt at the same time are made once, and a correction outlives its caller.
func TestReceiptConcurrently(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &failing{Store: local.New(), wait: make(chan struct{})}
		lim := newLimiter(t, f, testkit.Bucket("n", 10, time.Hour), nil)
		d := must[quota.Decision](t)(lim.Take(bg, "k", 5))
		ctx, cancel := context.WithCancel(bg)
		var wg sync.WaitGroup
		var made, replayed int
		var mu sync.Mutex
		for range 8 {
			wg.Go(func() {
				got, err := lim.Settle(ctx, "k", d, 1)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err != nil || got.Charged != -4:
					t.Errorf("settle: got %v, %v, want 4 back", got, err)
				case got.Replayed:
					replayed++
				default:
					made++
				}
			})
		}
		synctest.Wait()
		cancel()
		close(f.wait)
		wg.Wait()
		if made != 1 || replayed != 7 || f.asked != 1 {
			t.Errorf("settles: got %d made, %d replayed, %d requests, want 1, 7 and 1", made, replayed, f.asked)
		}
		// Lists too: of refunds alone.
		d = must[quota.Decision](t)(lim.Take(bg, "k", 5))
		if _, err := lim.ChargeAll(ctx, quota.Charge{Key: "k"}.Settle(d, 1)); err != nil {
			t.Errorf("list of a settle, with a context that ended: got %v, want nil", err)
		}
		if _, err := lim.ChargeAll(ctx, quota.Charge{Key: "k", Cost: 1}); !errors.Is(err, context.Canceled) {
			t.Errorf("list of a take, with a context that ended: got %v, want %v", err, context.Canceled)
		}
	})
}

// Where the charge had a request id, two processes correct its receipt once.
func TestReceiptWithID(t *testing.T) {
	store := local.New()
	limit := testkit.Bucket("n", 10, time.Hour)
	for _, id := range []string{"id", fmt.Sprintf("%0128d", 7)} {
		charge := quota.Charge{Limit: limit, Key: "k" + id[:2], Cost: 5, ID: id}
		var left int64
		for process := range 2 {
			lim := newLimiter(t, store, limit, nil)
			r := must[quota.Result](t)(lim.ChargeAll(bg, charge))
			r = must[quota.Result](t)(lim.ChargeAll(bg, charge.Settle(r.Decisions[0], 2)))
			if d := r.Decisions[0]; d.Replayed != (process == 1) || d.Charged != -3 {
				t.Errorf("settle by process %d: got %v, want 3 back, made once", process, d)
			}
			left = must[quota.Decision](t)(lim.Peek(bg, charge.Key, 0)).Remaining
			_, err := lim.ChargeAll(bg, charge.Refund(r.Decisions[0], 0))
			testkit.WantInvalid(t, err, "receipt") // a refund is no receipt
		}
		if left != 8 {
			t.Errorf("remaining: got %d, want 8", left)
		}
	}
}

// The memory of corrections is bounded: the oldest is forgotten.
func TestReceiptsAreForgotten(t *testing.T) {
	lim := newLimiter(t, local.New(), testkit.Bucket("n", 1<<30, time.Hour), nil)
	var first quota.Decision
	for i := range quota.MaxCorrections + 1 {
		d := must[quota.Decision](t)(lim.Take(bg, "k", 1))
		if i == 0 {
			first = d
		}
		if d = must[quota.Decision](t)(lim.Refund(bg, "k", d, 1)); d.Replayed {
			t.Fatalf("refund %d: got %v, want it made", i, d)
		}
	}
	if n := lim.Corrections(); n != quota.MaxCorrections {
		t.Errorf("corrections that are remembered: got %d, want %d", n, quota.MaxCorrections)
	}
	if d := must[quota.Decision](t)(lim.Refund(bg, "k", first, 1)); d.Replayed {
		t.Errorf("refund of the first receipt: got %v, want it made, for it is forgotten", d)
	}
}

// A correction in a list that was denied was not made: the receipt is still good.
func TestACorrectionInADeniedList(t *testing.T) {
	eachDoor(t, func(t *testing.T, door string) {
		lim := newLimiter(t, local.New(), testkit.Bucket("n", 10, time.Hour), nil)
		d := must[quota.Decision](t)(lim.Take(bg, "k", 5))
		for range 2 {
			r := must[quota.Result](t)(lim.ChargeAll(bg, quota.Charge{Key: "other", Cost: 11}, quota.Charge{Key: "k"}.Settle(d, 2)))
			if r.Granted {
				t.Fatalf("list with a cost above the capacity: got %v, want it denied", r)
			}
		}
		if n := lim.Corrections(); n != 0 {
			t.Errorf("corrections that are remembered: got %d, want 0", n)
		}
		got, err := doors[door].settle(lim, bg, "k", d, 2)
		if err != nil || got.Replayed || got.Charged != -3 || got.Remaining != 8 {
			t.Errorf("settle after a denied list with it: got %v, %v, want 3 given back, 8 left", got, err)
		}
	})
}

// denyingLists is a store that denies lists once they were held up.
type denyingLists struct {
	quota.Store
	held, free chan struct{}
}

func (s denyingLists) ChargeAll(_ context.Context, _ []quota.Charge, out []quota.Decision) error {
	close(s.held)
	<-s.free
	clear(out)
	return nil
}

// A settle that comes while a list with the same correction is under way is made once the list was denied.
func TestACorrectionWhileItsListIsDenied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := denyingLists{local.New(), make(chan struct{}), make(chan struct{})}
		lim := newLimiter(t, store, testkit.Bucket("n", 10, time.Hour), nil)
		d := must[quota.Decision](t)(lim.Take(bg, "k", 5))
		go lim.ChargeAll(bg, quota.Charge{Key: "other", Cost: 1}, quota.Charge{Key: "k"}.Settle(d, 2))
		<-store.held
		over := make(chan struct{})
		go func() {
			defer close(over)
			if got, err := lim.Settle(bg, "k", d, 2); err != nil || got.Replayed || got.Charged != -3 {
				t.Errorf("settle: got %v, %v, want 3 given back", got, err)
			}
		}()
		synctest.Wait()
		close(store.free)
		<-over
	})
}
