package fleetquota_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota"
	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/lease"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/quotatest"
	"github.com/fleetquota/fleetquota/resilience"
)

// untouched is a database that must not be asked.
type untouched struct{ t *testing.T }

func (u untouched) Load(context.Context, []string) ([]driver.Entry, quota.Micros, error) {
	u.t.Error("Load: got a call, want none")
	return nil, 0, errors.New("asked")
}

func (u untouched) Swap(context.Context, []driver.Change) (bool, error) {
	u.t.Error("Swap: got a call, want none")
	return false, errors.New("asked")
}

func (u untouched) Transact(context.Context, *driver.Access, driver.Decide) error {
	u.t.Error("Transact: got a call, want none")
	return errors.New("asked")
}

// down is a store whose server is down.
type down struct{ quota.Store }

func (down) Charge(context.Context, quota.Charge) (quota.Decision, error) {
	return quota.Decision{}, quota.ErrUnavailable
}

func (down) ChargeAll(context.Context, []quota.Charge, []quota.Decision) error {
	return quota.ErrUnavailable
}

// notValid are limits by a part of their errors.
var notValid = map[string]*quota.Limit{
	"capacity is -1":   quota.NewLimit("n", algorithm.TokenBucket(-1, 1, time.Second)),
	"limit is -2":      quota.NewLimit("n", algorithm.FixedWindow(-2, time.Second)), // another error under the same name
	`limit name is ""`: quota.NewLimit("", algorithm.Unlimited),
	"the zero Limit":   {},
}

// TestStoresRefuseALimitThatIsNotValid: stores and policies that get a charge from elsewhere than a limiter refuse it with the
// error that its limit carries, in an outage too, and have the server do nothing.
func TestStoresRefuseALimitThatIsNotValid(t *testing.T) {
	client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", MaxRetries: -1})
	defer client.Close()
	wrap := func(s quota.Store, p resilience.Policy) quota.Store { return quota.Must(resilience.Wrap(s, p)) }
	stores := map[string]quota.Store{
		"local":         local.New(),
		"quotatest":     quotatest.New(t, nil),
		"goredis":       quota.Must(goredis.New(client, nil)),
		"NewCAS":        quota.Must(driver.NewCAS(untouched{t}, nil)),
		"Transactional": quota.Must(driver.NewTransactional(untouched{t}, nil)),
		"lease":         quota.Must(lease.New(local.New(), &lease.Options{Instances: func() int64 { return 1 }})),
		"memory":        wrap(local.New(), resilience.DenialMemory(nil)),
		"standard":      quota.Must(resilience.Standard(local.New(), resilience.FailOpen(nil), nil)),
		"open, down":    wrap(down{local.New()}, resilience.FailOpen(nil)),
		"closed, down":  wrap(down{local.New()}, resilience.FailClosed(nil)),
		"share":         wrap(local.New(), resilience.Fallback(local.New(), resilience.Instances(2), nil)),
		"share, down":   wrap(down{local.New()}, resilience.Fallback(local.New(), resilience.Instances(2), nil)),
	}
	ok := quota.NewLimit("ok", algorithm.TokenBucket(10, 1, time.Minute))
	for name, s := range stores {
		t.Run(name, func(t *testing.T) {
			defer s.Close()
			for reason, limit := range notValid {
				c := quota.Charge{Limit: limit, Key: "g/k", Cost: 1}
				withID := c
				withID.ID = "id"
				_, one := s.Charge(t.Context(), c)
				_, identified := s.Charge(t.Context(), withID)
				all := s.ChargeAll(t.Context(), []quota.Charge{{Limit: ok, Key: "g/k", Cost: 1}, c}, make([]quota.Decision, 2))
				for call, err := range map[string]error{"Charge": one, "Charge with an id": identified, "ChargeAll": all} {
					if !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), reason) {
						t.Errorf("%s to a limit of which %s: got %v, want ErrInvalid with that text", call, reason, err)
					}
				}
			}
		})
	}
}

// TestOptionsRefuseALimitThatIsNotValid: constructors that take limits return the error that a limit carries.
func TestOptionsRefuseALimitThatIsNotValid(t *testing.T) {
	wrong := quota.NewLimit("n", algorithm.TokenBucket(-1, 1, time.Second))
	_, leased := lease.New(local.New(), &lease.Options{Instances: func() int64 { return 1 }, Limits: []*quota.Limit{wrong}})
	_, configured := fleetquota.New(t.Context(), fleetquota.Config{Limit: wrong})
	for text, err := range map[string]error{"Options.Limits[0]": leased, "Config.Limit": configured} {
		if !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), "capacity is -1") || !strings.Contains(err.Error(), text) {
			t.Errorf("%s with a capacity of -1: got %v, want ErrInvalid that names both", text, err)
		}
	}
}

// TestCallersAreToldOfALimitThatIsNotValid: all that a program hands a limit to fails with the error that the limit carries, and has the
// database do nothing.
func TestCallersAreToldOfALimitThatIsNotValid(t *testing.T) {
	ok := quota.NewLimit("ok", algorithm.TokenBucket(10, 1, time.Minute))
	store := quota.Must(driver.NewCAS(untouched{t}, nil))
	held := local.New()
	if _, err := held.Charge(t.Context(), quota.Charge{Limit: ok, Key: "g/k", Cost: 1}); err != nil {
		t.Fatal(err)
	}
	one := func(_ quota.Decision, err error) error { return err }
	all := func(_ quota.Result, err error) error { return err }
	limiter := quota.Must(quota.NewLimiter(store, ok, nil))
	for reason, limit := range notValid {
		chosen := quota.Must(quota.NewLimiter(store, ok, &quota.Options{LimitFor: func(string) *quota.Limit { return limit }}))
		c := quota.Charge{Limit: limit, Key: "g/k", Cost: 1}
		var told error
		handler := quota.Must(quotahttp.New(limiter, &quotahttp.Options{FailOpen: true, Error: func(_ *http.Request, err error) { told = err }},
			quotahttp.By(func(*http.Request) (string, error) { return "g/k", nil }, ok, limit)))(http.NotFoundHandler())
		answer := httptest.NewRecorder()
		handler.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/", nil))
		if answer.Code != http.StatusInternalServerError {
			t.Errorf("a request by a limit of which %s: got status %d, want %d", reason, answer.Code, http.StatusInternalServerError)
		}
		_, made := quota.NewLimiter(store, limit, nil)
		_, sibling := limiter.For(limit)
		_, text := limit.MarshalText()
		_, _, first := backend.List(t.Context(), held, backend.Listing{Limits: []*quota.Limit{limit}})
		_, _, second := backend.List(t.Context(), held, backend.Listing{Limits: []*quota.Limit{ok, limit}})
		_, _, each := backend.List(t.Context(), held, backend.Listing{LimitFor: func(string) *quota.Limit { return limit }})
		for door, err := range map[string]error{
			"NewLimiter": made, "For": sibling, "MarshalText": text, "Check": quota.Check([]quota.Charge{c}),
			"ChargeAll": all(limiter.ChargeAll(t.Context(), quota.Charge{Key: "g/k", Cost: 1}, c)), "WaitAll": all(limiter.WaitAll(t.Context(), c)),
			"TakeFirst":        func() error { _, err := limiter.TakeFirst(t.Context(), []quota.Charge{c}); return err }(),
			"Take by LimitFor": one(chosen.Take(t.Context(), "g/k", 1)), "Wait by LimitFor": one(chosen.Wait(t.Context(), "g/k", 1)),
			"Peek by LimitFor": one(chosen.Peek(t.Context(), "g/k", 1)), "List": first, "List of two": second, "List by LimitFor": each,
			"quotahttp.By": told,
		} {
			if !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), reason) {
				t.Errorf("%s with a limit of which %s: got %v, want ErrInvalid with that text", door, reason, err)
			}
		}
	}
}
