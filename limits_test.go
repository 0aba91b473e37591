package fleetquota_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota"
	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/lease"
	"github.com/fleetquota/fleetquota/backend/local"
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
			for reason, limit := range map[string]*quota.Limit{
				"capacity is -1":   quota.NewLimit("n", algorithm.TokenBucket(-1, 1, time.Second)),
				"limit is -2":      quota.NewLimit("n", algorithm.FixedWindow(-2, time.Second)), // another error under the same name
				`limit name is ""`: quota.NewLimit("", algorithm.Unlimited),
				"the zero Limit":   {},
			} {
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
