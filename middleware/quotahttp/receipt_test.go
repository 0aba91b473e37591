package quotahttp_test

import (
	"context"
	"errors"
	"net/http"
	"testing"

	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quotatest"
)

// hundred is the estimate of these tests.
func hundred(*http.Request) int64 { return 100 }

func serverErrors(status int) bool { return status >= 500 }

// TestReceipt: the tokens that stay charged after a handler that settles, refunds, fails, panics or says
// nothing.
func TestReceipt(t *testing.T) {
	from := func(r *http.Request) *quotahttp.Receipt { return quotahttp.From(r.Context()) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	for name, test := range map[string]struct {
		handler http.HandlerFunc
		refund  func(int) bool
		want    int64
	}{
		"nothing said": {ok, serverErrors, 100},
		"fewer":        {func(_ http.ResponseWriter, r *http.Request) { must(from(r).Settle("tokens", 30)) }, nil, 30},
		"more":         {func(_ http.ResponseWriter, r *http.Request) { must(from(r).Settle("tokens", 1700)) }, nil, 1700},
		"none":         {func(_ http.ResponseWriter, r *http.Request) { must(from(r).Settle("tokens", 0)) }, nil, 0},
		"as many":      {func(_ http.ResponseWriter, r *http.Request) { must(from(r).Settle("tokens", 100)) }, nil, 100},
		"refund":       {func(_ http.ResponseWriter, r *http.Request) { must(from(r).Refund()) }, nil, 0},
		"the last of two": {func(_ http.ResponseWriter, r *http.Request) {
			must(from(r).Settle("tokens", 1))
			must(from(r).Settle("tokens", 40))
		}, nil, 40},
		"settled, then 500": {func(w http.ResponseWriter, r *http.Request) { must(from(r).Settle("tokens", 30)); w.WriteHeader(500) }, serverErrors, 30},
		"500":               {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }, serverErrors, 0},
		"500, not asked":    {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }, nil, 100},
		"400":               {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(400) }, serverErrors, 100},
		"the first status":  {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(200); w.WriteHeader(500) }, serverErrors, 100},
		"103, then 502":     {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(103); w.WriteHeader(502) }, serverErrors, 0},
		"panic":             {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, serverErrors, 0},
		"panic after 200":   {func(w http.ResponseWriter, r *http.Request) { ok(w, r); panic(http.ErrAbortHandler) }, serverErrors, 0},
		"panic, not asked":  {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, nil, 100},
		"settled, then a panic": {func(_ http.ResponseWriter, r *http.Request) {
			must(from(r).Settle("tokens", 30))
			panic(http.ErrAbortHandler)
		}, serverErrors, 30},
	} {
		t.Run(name, func(t *testing.T) {
			store := quotatest.New(t, nil)
			var errs errorList
			h := handler(t, store, &quotahttp.Options{Refund: test.refund, Error: errs.tell}, test.handler, byPeer(tokens).Cost(hundred), byPeer(minute).Shadow())
			func() {
				defer func() {
					if err := recover(); err != nil && err != http.ErrAbortHandler {
						panic(err)
					}
				}()
				send(h)
			}()
			store.WantCharged(tokens, peerKey, test.want)
			requests := int64(1)
			if name == "refund" || test.want == 0 && test.refund != nil {
				requests = 0
			}
			store.WantCharged(minute, peerKey, requests)
			if got := errs.take(); len(got) != 0 {
				t.Errorf("errors told: got %v, want none", got)
			}
		})
	}
}

// A client that leaves while the handler runs is settled all the same, in one call for all limits.
func TestReceiptOfClientGone(t *testing.T) {
	store := quotatest.New(t, nil)
	gone, cancel := context.WithCancel(t.Context())
	h := handler(t, store, nil, func(_ http.ResponseWriter, r *http.Request) {
		if err := quotahttp.From(r.Context()).Settle("tokens", 30); err != nil {
			t.Error(err)
		}
		if err := quotahttp.From(r.Context()).Settle("minute", 2); err != nil {
			t.Error(err)
		}
		cancel()
	}, byPeer(tokens, minute))
	send(h, func(r *http.Request) { *r = *r.WithContext(gone) })
	store.WantCharged(tokens, peerKey, 30)
	store.WantCharged(minute, peerKey, 2)
	if got := len(store.Calls()); got != 2 {
		t.Errorf("calls of the store: got %d, want 2: the charge and all corrections", got)
	}
}

// A handler that goes on after it returned settles once more, at once.
func TestReceiptLate(t *testing.T) {
	store := quotatest.New(t, nil)
	var receipt *quotahttp.Receipt
	h := handler(t, store, nil, func(_ http.ResponseWriter, r *http.Request) { receipt = quotahttp.From(r.Context()) }, byPeer(tokens).Cost(hundred))
	send(h)
	store.WantCharged(tokens, peerKey, 100)
	for range 2 {
		if err := receipt.Settle("tokens", 40); err != nil {
			t.Error(err)
		}
	}
	store.WantCharged(tokens, peerKey, 40)
	if err := receipt.Settle("tokens", 50); !errors.Is(err, quota.ErrInvalid) {
		t.Errorf("another late settle: got %v, want ErrInvalid", err)
	}
}

// Misuse is an error: a wrong name, a cost below 0, no middleware. Nothing charged is nothing to settle.
func TestReceiptMisuse(t *testing.T) {
	store := quotatest.New(t, nil)
	var errs errorList
	settle := func(name string, n int64, invalid bool) http.HandlerFunc {
		return func(_ http.ResponseWriter, r *http.Request) {
			if err := quotahttp.From(r.Context()).Settle(name, n); errors.Is(err, quota.ErrInvalid) != invalid || !invalid && err != nil {
				t.Errorf("settle of %d of %q: got %v, want invalid: %v", n, name, err, invalid)
			}
		}
	}
	send(handler(t, store, nil, settle("token", 1, true), byPeer(tokens)))
	send(handler(t, store, nil, settle("tokens", -1, true), byPeer(tokens)))
	send(settle("tokens", 1, true))
	skip := func(*http.Request) bool { return true }
	send(handler(t, store, nil, settle("tokens", 1, false), byPeer(tokens).Skip(skip)))
	send(handler(t, &answers{err: quota.ErrUnavailable}, &quotahttp.Options{FailOpen: true, Error: errs.tell}, settle("tokens", 1, false), byPeer(tokens)))
	store.WantCharged(tokens, peerKey, 2)
}

// A receipt reaches the charges of a middleware around its own.
func TestReceiptNested(t *testing.T) {
	store := quotatest.New(t, nil)
	settle := func(_ http.ResponseWriter, r *http.Request) {
		if err := quotahttp.From(r.Context()).Settle("tokens", 40); err != nil {
			t.Error(err)
		}
	}
	h := handler(t, store, nil, handler(t, store, nil, settle, byPeer(minute)).ServeHTTP, byPeer(tokens).Cost(hundred))
	send(h)
	store.WantCharged(tokens, peerKey, 40)
	store.WantCharged(minute, peerKey, 1)
	refund := func(_ http.ResponseWriter, r *http.Request) {
		if err := quotahttp.From(r.Context()).Refund(); err != nil {
			t.Error(err)
		}
	}
	send(handler(t, store, nil, handler(t, store, nil, refund, byPeer(minute)).ServeHTTP, byPeer(tokens).Cost(hundred)))
	store.WantCharged(tokens, peerKey, 40)
	store.WantCharged(minute, peerKey, 1)
}

// A correction that fails is told.
func TestReceiptFailed(t *testing.T) {
	store := quotatest.New(t, nil)
	var errs errorList
	h := handler(t, store, &quotahttp.Options{Error: errs.tell}, func(_ http.ResponseWriter, r *http.Request) {
		store.FailNext(1, quota.ErrUnavailable)
		if err := quotahttp.From(r.Context()).Refund(); err != nil {
			t.Error(err)
		}
	}, byPeer(tokens).Cost(hundred))
	wantStatus(t, send(h), 200)
	if got := errs.take(); len(got) != 1 || !errors.Is(got[0], quota.ErrUnavailable) {
		t.Errorf("errors told: got %v, want ErrUnavailable", got)
	}
}
