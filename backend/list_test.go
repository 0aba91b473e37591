package backend_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/lease"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quotatest"
	"github.com/fleetquota/fleetquota/resilience"
)

// An operator looks at a tenant's quotas, a page at a time.
func ExampleList() {
	ctx := context.Background()
	perAgent := quota.NewLimit("tokens", algorithm.TokenBucket(1000, 1, time.Hour))
	limiter := quota.Must(quota.NewLimiter(local.New(), perAgent, nil))
	defer limiter.Close()
	for i := range 5 {
		limiter.Take(ctx, fmt.Sprintf("team-7/agent-%d", i), int64(100*i+1))
		limiter.Take(ctx, fmt.Sprintf("team-8/agent-%d", i), 1)
	}

	listing := backend.Listing{Limits: []*quota.Limit{perAgent}, Prefix: "team-7/", Size: 2}
	spent, pages := int64(0), 0
	for {
		keys, next, err := backend.List(ctx, limiter.Store(), listing)
		if err != nil {
			fmt.Println(err)
			return
		}
		pages++
		for _, k := range keys { // k.Limit is "tokens", k.Key such as "team-7/agent-3"
			spent += k.Decision.Capacity - k.Decision.Remaining
		}
		if listing.Cursor = next; next == "" {
			break
		}
	}
	fmt.Println("team-7 spent", spent, "tokens, on", pages, "pages")
	// Output: team-7 spent 1005 tokens, on 3 pages
}

// down is a store that decides nothing.
type down struct{ quota.Store }

func (down) Charge(context.Context, quota.Charge) (quota.Decision, error) {
	return quota.Decision{}, fmt.Errorf("down: %w", quota.ErrUnavailable)
}

func (d down) Unwrap() quota.Store { return d.Store }

// TestList lists the keys of the store inside policies and leases, and never those of a fallback.
func TestList(t *testing.T) {
	limit := quota.NewLimit("tokens", algorithm.TokenBucket(10, 1, time.Hour))
	for name, wrap := range map[string]func(quota.Store) (quota.Store, error){
		"nothing": func(s quota.Store) (quota.Store, error) { return s, nil },
		"policies": func(s quota.Store) (quota.Store, error) {
			other := local.New()
			other.Charge(t.Context(), quota.Charge{Limit: limit, Key: "of the fallback", Cost: 1})
			return resilience.Standard(s, resilience.Fallback(other, resilience.Instances(4), nil), nil)
		},
		"an outage under policies": func(s quota.Store) (quota.Store, error) {
			return resilience.Standard(down{s}, resilience.Fallback(local.New(), resilience.Instances(4), nil), nil)
		},
		"leases": func(s quota.Store) (quota.Store, error) {
			return lease.New(s, &lease.Options{Instances: func() int64 { return 4 }})
		},
		"a store of tests": func(quota.Store) (quota.Store, error) {
			s := quotatest.New(t, nil)
			_, err := s.Charge(t.Context(), quota.Charge{Limit: limit, Key: "k", Cost: 2})
			return s, err
		},
	} {
		inner := local.New()
		if _, err := inner.Charge(t.Context(), quota.Charge{Limit: limit, Key: "k", Cost: 2}); err != nil {
			t.Fatal(err)
		}
		store, err := wrap(inner)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		keys, next, err := backend.List(t.Context(), store, backend.Listing{Limits: []*quota.Limit{limit}})
		if err != nil || next != "" || len(keys) != 1 || keys[0].Key != "k" || keys[0].Decision.Remaining != limit.Capacity()-2 {
			t.Errorf("%s: got %+v, %q, %v, want the key of the store", name, keys, next, err)
		}
		store.Close()
	}
}

// broken is an algorithm that panics.
type broken struct{ quota.Algorithm }

func (broken) Decide(quota.State, quota.Request, quota.Micros) (quota.State, quota.Verdict) {
	panic("broken")
}

// failing is a lister that decides nothing.
type failing struct{ *local.Store }

func (failing) Charge(ctx context.Context, _ quota.Charge) (quota.Decision, error) {
	return quota.Decision{}, fmt.Errorf("down: %w", quota.ErrUnavailable)
}

func TestListRefuses(t *testing.T) {
	limit, store := quota.NewLimit("tokens", algorithm.TokenBucket(10, 1, time.Hour)), local.New()
	for i := range 100 {
		store.Charge(t.Context(), quota.Charge{Limit: limit, Key: fmt.Sprint("k-", i), Cost: 1})
	}
	_, cursor, err := backend.List(t.Context(), store, backend.Listing{Size: 2})
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		store quota.Store
		l     backend.Listing
		want  error
		text  string
	}{
		"no store":                   {nil, backend.Listing{}, quota.ErrInvalid, "accepted: a store"},
		"a store that cannot list":   {struct{ quota.Store }{store}, backend.Listing{}, errors.ErrUnsupported, "accepted: a driver.Lister"},
		"a nil limit":                {store, backend.Listing{Limits: []*quota.Limit{limit, nil}}, quota.ErrInvalid, "Limits[1]"},
		"limits of one name":         {store, backend.Listing{Limits: []*quota.Limit{limit, limit}}, quota.ErrInvalid, "two limits called"},
		"a size":                     {store, backend.Listing{Size: 1001}, quota.ErrInvalid, "accepted: 0 to 1000"},
		"another store's cursor":     {local.New(), backend.Listing{Cursor: cursor}, quota.ErrInvalid, "of the same store"},
		"peeks that fail":            {failing{store}, backend.Listing{Limits: []*quota.Limit{limit}}, quota.ErrUnavailable, "down"},
		"peeks that nobody asked of": {failing{store}, backend.Listing{}, nil, ""},
	} {
		keys, _, err := backend.List(t.Context(), test.store, test.l)
		if !errors.Is(err, test.want) || test.want != nil && (len(keys) > 0 || !strings.Contains(err.Error(), test.text)) {
			t.Errorf("%s: got %d keys, %v, want %v with %q", name, len(keys), err, test.want, test.text)
		}
	}
	bad := quota.NewLimit(limit.Name(), broken{limit.Algorithm()})
	keys, _, err := backend.List(t.Context(), store, backend.Listing{Limits: []*quota.Limit{bad}, Size: 1})
	if err != nil || len(keys) != 1 || !errors.Is(keys[0].Err, quota.ErrMisconfigured) || !strings.Contains(keys[0].Err.Error(), "broken") {
		t.Errorf("a limit whose algorithm panics: got %+v, %v, want the panic as the key's error", keys, err)
	}
	store.Close()
	if _, _, err := backend.List(t.Context(), store, backend.Listing{}); !errors.Is(err, quota.ErrClosed) {
		t.Errorf("a closed store: got error %v, want ErrClosed", err)
	}
}
