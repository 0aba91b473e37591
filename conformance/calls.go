package conformance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// handle is a store under test. Its methods note the calls that are under way.
type handle struct {
	t       *trial
	store   quota.Store
	opening Opening
}

// take decides one charge by Charge.
func (h *handle) take(ctx context.Context, c quota.Charge) (d quota.Decision, err error) {
	defer h.called(&err, "Charge", c)()
	return h.store.Charge(ctx, c)
}

// chargeAll decides a list by ChargeAll.
func (h *handle) chargeAll(ctx context.Context, cs ...quota.Charge) (ds []quota.Decision, err error) {
	defer h.called(&err, "ChargeAll", cs...)()
	ds = make([]quota.Decision, len(cs))
	for i := range ds { // with wrong values, so that a field that the store does not write is seen
		ds[i] = quota.Decision{Allowed: true, Source: quota.FromLease, Split: true, Replayed: true, Shadow: true, Alternative: 99, Capacity: -1, Remaining: -1, Charged: -1, RetryAfter: -1, ResetAfter: -1, Delay: -1, At: -1}
	}
	return ds, h.store.ChargeAll(ctx, cs, ds)
}

// close closes the store.
func (h *handle) close() (err error) {
	defer h.called(&err, "Close")()
	return h.store.Close()
}

// called notes that a call is under way. It returns the function that notes the call's end and turns a panic into an
// error.
func (h *handle) called(err *error, method string, cs ...quota.Charge) func() {
	text := method + show(cs)
	returned := h.t.begun(&text)
	return func() {
		if v := recover(); v != nil {
			*err = fmt.Errorf("the store panicked on %s: %v\n%s", text, v, stackOfPanic())
		}
		returned()
	}
}

// begun notes that a call is under way, and returns the function that notes its end.
func (t *trial) begun(text *string) (returned func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls[text] = struct{}{}
	return func() {
		t.progress.Add(1)
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.calls, text)
	}
}

// handles returns a handle for each of n goroutines. They get two handles in turn, or the only one if handles do not
// share data.
func (t *trial) handles(in *recorder, n int) []*handle {
	o := Opening{Data: t.data()}
	each := []*handle{t.openIn(in, o)}
	if !t.lacks(Shared) {
		each = append(each, t.openSecond(in, o))
	}
	all := make([]*handle, n)
	for i := range all {
		all[i] = each[i%len(each)]
	}
	return all
}

// persist repeats a call until it is answered or its outcome is unknown.
func (t *trial) persist(h *handle, list bool, cs ...quota.Charge) (ds []quota.Decision, unknown bool) {
	for r := t.retry(); ; {
		var err error
		if len(cs) == 1 && !list {
			var d quota.Decision
			d, err = h.take(bg, cs[0])
			ds = []quota.Decision{d}
		} else {
			ds, err = h.chargeAll(bg, cs...)
		}
		switch {
		case err == nil:
			return ds, substituted(ds)
		case indeterminate(err):
			return nil, true
		case !transient(err) || !r.again():
			t.fatalf("%s:\n%s\n\twant an answer", strings.TrimSpace(show(cs)), answer(nil, err))
		}
	}
}

// ask repeats a call until it is answered. The call must be a peek, or have an id.
func (t *trial) ask(h *handle, c quota.Charge) quota.Decision {
	return t.askAll(h, []quota.Charge{c})[0]
}

// askAll does the same with a list; a list of one is a Charge.
func (t *trial) askAll(h *handle, cs []quota.Charge) (ds []quota.Decision) {
	for r := t.retry(); ; {
		var err error
		if len(cs) == 1 {
			var d quota.Decision
			d, err = h.take(bg, cs[0])
			ds = []quota.Decision{d}
		} else {
			ds, err = h.chargeAll(bg, cs...)
		}
		switch {
		case err == nil && !substituted(ds):
			return ds
		case !r.again():
			t.fatalf("the store does not answer%s:\n%s", showSome(cs), answer(ds[:min(len(ds), 4)], err))
		}
	}
}

// used returns the tokens that are charged to a key.
func (t *trial) used(h *handle, l *quota.Limit, key string) int64 {
	d := t.ask(h, quota.Charge{Limit: l, Key: key, Op: quota.OpPeek})
	return l.Spec().Capacity - d.Remaining
}

// retry counts the tries of a call, and the time that they took: less than passed, on a machine that is slow.
type retry struct {
	t      *trial
	last   time.Time
	waited float64 // ns
	tries  int
}

func (t *trial) retry() *retry { return &retry{t: t, last: time.Now()} }

// again waits a little, longer each time, and reports whether the caller should try again. After the suite gave up on a
// call once, it waits less for the next calls, unless it asks whether the store answers at all.
func (r *retry) again() bool {
	s := r.t.suite
	patience := r.t.patience()
	if s.gaveUp.Load() && !r.t.of.first {
		patience /= 20
	}
	r.waited += float64(time.Since(r.last)) / s.slowness()
	r.last = time.Now()
	if r.tries++; r.tries > 20 && r.waited > float64(patience) {
		s.gaveUp.Store(true)
		return false
	}
	time.Sleep(min(time.Duration(r.tries), 100) * time.Millisecond)
	return true
}

// needLists skips a case for a store that decides single charges only.
func needLists(t *trial) {
	if driver.AtomicityOf(t.open(Opening{}).store) == driver.OneKey {
		t.excusef("the store decides one key in a step, says its Atomicity")
	}
}

// transient reports whether an error says that no token was charged and that the same call may succeed later.
func transient(err error) bool {
	return errors.Is(err, quota.ErrUnavailable) || errors.Is(err, quota.ErrOverloaded) || errors.Is(err, quota.ErrConflict)
}

func indeterminate(err error) bool { return errors.Is(err, quota.ErrIndeterminate) }

// substituted reports whether a policy answered in place of the store.
func substituted(ds []quota.Decision) bool {
	return slices.ContainsFunc(ds, func(d quota.Decision) bool {
		return d.Source == quota.FromFallback || d.Source == quota.FromOpen || d.Source == quota.FromClosed
	})
}

var bg = context.Background()

// wantKnown fails the case unless callers can recognize the error: an error of package quota, or the error of a context
// that is done.
func (t *trial) wantKnown(ctx context.Context, c quota.Charge, err error) {
	if !known(ctx, err) {
		t.fatalf("Charge%s:\n%s\n\twant an error of package quota, or that of a context that is done", show([]quota.Charge{c}), answer(nil, err))
	}
}

func known(ctx context.Context, err error) bool {
	switch driver.Sentinel(err) {
	case quota.ErrUnavailable, quota.ErrIndeterminate, quota.ErrConflict, quota.ErrOverloaded, quota.ErrMisconfigured, quota.ErrClosed:
		return true
	}
	if end, set := ctx.Deadline(); set && !time.Now().Before(end) && errors.Is(err, context.DeadlineExceeded) {
		return true // a socket may see a deadline pass before the context's timer does
	}
	return ctx.Err() != nil && errors.Is(err, ctx.Err())
}
