package fleetquota

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/observe/quotalog"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

// DefaultTimeout bounds a decision, unless Config.Timeout says otherwise. It is long enough for the first one, which also
// connects, with TLS and to a cluster.
const DefaultTimeout = 500 * time.Millisecond

// Outage says what happens to requests while the store cannot decide.
type Outage string

// The ways to decide about requests while the store cannot.
const (
	// OutageShare decides on this process's share of each limit, one part in Config.Fleet, and charges the store later, see
	// [resilience.Fallback].
	OutageShare Outage = "share"
	// OutageError gives callers the error, such as [quota.ErrUnavailable].
	OutageError Outage = "error"
	// OutageOpen admits, see [resilience.FailOpen].
	OutageOpen Outage = "open"
	// OutageClosed denies, see [resilience.FailClosed].
	OutageClosed Outage = "closed"
)

// Config is the configuration of [New], written in a program or read by [ConfigFromEnv]. The zero value takes the defaults: a
// bucket of 1000 tokens that gains 10 a second for each key, in the memory of this process.
type Config struct {
	// URL is the store, as backend.Open takes it; "" is the memory of this process.
	URL string
	// Store is the store, in place of a URL. The limiter closes it.
	Store quota.Store
	// Limit is the limit of keys for which LimitFor has none; nil is "tokens: 1000 burst 10/s bucket".
	Limit *quota.Limit
	// Fleet is how many processes share the store, up to 1000000: in an outage each decides on one part in Fleet. 0 is
	// unknown.
	Fleet int64
	// Outage says what happens while the store cannot decide; "" is OutageShare where Fleet is known, and OutageError
	// where not. OutageShare needs Fleet.
	Outage Outage
	// FallbackKeys is how many keys OutageShare keeps account of, up to 2^30; 0 is resilience.DefaultFallbackKeys.
	FallbackKeys int
	// Timeout is the longest time that a decision of the store may take; 0 is DefaultTimeout.
	Timeout time.Duration
	// InFlight bounds the decisions in flight, for each node of the store; 0 is resilience.DefaultInFlight.
	InFlight int
	// Breaker changes the circuit breaker; nil takes its defaults.
	Breaker *resilience.BreakerOptions
	// MaxWaiters, LimitFor and Observers are those of quota.Options.
	MaxWaiters int
	LimitFor   func(key string) *quota.Limit
	Observers  []func(context.Context, *quota.Call)
	// Logger receives notices for operators, such as an open breaker, as warnings; nil is slog.Default.
	Logger *slog.Logger

	variable struct{ name, url string } // the variable that URL came from
}

// ConfigFromEnv reads a configuration from environment variables, each of which may be absent or empty:
//
//	QUOTA_URL, REDIS_URL  Config.URL; the two may be the same
//	QUOTA_LIMIT           Config.Limit as text, such as "calls: 100/1m sliding", see algorithm.ParseLimit
//	TOKEN_BUCKET_SIZE     without QUOTA_LIMIT: the capacity of a bucket called tokens, 1 to 2^52-1; default 1000
//	TOKEN_REFILL_RATE     without QUOTA_LIMIT: the tokens that the bucket gains a second, such as 10.5; default 10.0
//	FLEET_SIZE            Config.Fleet, 1 to 1000000
//	QUOTA_OUTAGE          Config.Outage: share, error, open or closed
//	FALLBACK_MAX_KEYS     Config.FallbackKeys, 1 to 2^30
//	QUOTA_TIMEOUT         Config.Timeout, such as 250ms, up to an hour
//	QUOTA_IN_FLIGHT       Config.InFlight, 1 to 1000000
//	QUOTA_MAX_WAITERS     Config.MaxWaiters, 1 to 2^30
//
// A value that is not accepted is [quota.ErrInvalid], and so is QUOTA_URL beside another REDIS_URL, and QUOTA_LIMIT beside one
// of the variables of the bucket. The error names the variable and the accepted values, and holds no credentials.
func ConfigFromEnv() (Config, error) {
	var c Config
	var err error
	if c.Fleet, err = number("FLEET_SIZE", "the number of processes", maxFleet); err != nil {
		return Config{}, err
	}
	for _, v := range []struct {
		name, meaning string
		most          int64
		to            *int
	}{
		{"FALLBACK_MAX_KEYS", "the number of keys", maxKeys, &c.FallbackKeys},
		{"QUOTA_IN_FLIGHT", "the number of decisions in flight", maxFleet, &c.InFlight},
		{"QUOTA_MAX_WAITERS", "the number of waiting calls", maxKeys, &c.MaxWaiters},
	} {
		n, err := number(v.name, v.meaning, v.most)
		if err != nil {
			return Config{}, err
		}
		*v.to = int(n)
	}
	if s := os.Getenv("QUOTA_TIMEOUT"); s != "" {
		if c.Timeout, err = time.ParseDuration(s); err != nil || c.Timeout <= 0 || c.Timeout > time.Hour {
			return Config{}, invalid("QUOTA_TIMEOUT is %.40q; accepted: a time above 0, up to 1h, such as 250ms", s)
		}
	}
	c.Outage = Outage(os.Getenv("QUOTA_OUTAGE"))
	if err := c.checkOutage("QUOTA_OUTAGE"); err != nil {
		return Config{}, err
	}
	if c.Limit, err = limitFromEnv(); err != nil {
		return Config{}, err
	}
	for _, name := range []string{"QUOTA_URL", "REDIS_URL"} {
		url := os.Getenv(name)
		if url != "" && c.URL != "" && url != c.URL {
			return Config{}, invalid("QUOTA_URL and REDIS_URL are set and differ; accepted: one of them, or the same URL twice")
		}
		if url != "" && c.URL == "" {
			c.URL, c.variable.name, c.variable.url = url, name, url
		}
	}
	return c, nil
}

// limitFromEnv returns the limit of QUOTA_LIMIT, or of the two variables of the bucket.
func limitFromEnv() (*quota.Limit, error) {
	text := os.Getenv("QUOTA_LIMIT")
	if text == "" {
		bucket, err := backend.BucketFromEnv()
		if err != nil {
			return nil, fmt.Errorf("fleetquota: %w", err)
		}
		return quota.NewLimit("tokens", bucket), nil
	}
	for _, name := range []string{"TOKEN_BUCKET_SIZE", "TOKEN_REFILL_RATE"} {
		if os.Getenv(name) != "" {
			return nil, invalid("QUOTA_LIMIT and %s are set; accepted: QUOTA_LIMIT, or the variables of the bucket", name)
		}
	}
	limit, err := algorithm.ParseLimit(text)
	if err != nil {
		return nil, fmt.Errorf("fleetquota: QUOTA_LIMIT: %w", err)
	}
	return limit, nil
}

// number reads a variable, and returns 0 where it is absent.
func number(name, meaning string, most int64) (int64, error) {
	s := os.Getenv(name)
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 1 || n > most {
		return 0, invalid("%s is %.40q; accepted: %s, 1 to %d", name, s, meaning, most)
	}
	return n, nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("fleetquota: %w: "+format, append([]any{quota.ErrInvalid}, args...)...)
}

// check returns the ErrInvalid of a configuration that was written in a program.
func (c *Config) check() error {
	switch {
	case c.URL != "" && c.Store != nil:
		return invalid("Config has a URL and a Store; accepted: one of them")
	case c.Limit != nil && c.Limit.Err() != nil:
		return fmt.Errorf("fleetquota: Config.Limit: %w", c.Limit.Err())
	case c.Fleet < 0 || c.Fleet > maxFleet:
		return invalid("Config.Fleet is %d; accepted: 0 to %d", c.Fleet, maxFleet)
	case c.FallbackKeys < 0 || c.FallbackKeys > maxKeys:
		return invalid("Config.FallbackKeys is %d; accepted: 0 to %d", c.FallbackKeys, maxKeys)
	case c.Timeout < 0:
		return invalid("Config.Timeout is %v; accepted: 0 or more", c.Timeout)
	case c.InFlight < 0:
		return invalid("Config.InFlight is %d; accepted: 0 or more", c.InFlight)
	case c.Outage == OutageShare && c.Fleet == 0:
		return invalid("Config.Outage is %q without Config.Fleet; accepted: the number of processes in FLEET_SIZE or Config.Fleet", c.Outage)
	}
	return c.checkOutage("Config.Outage")
}

func (c *Config) checkOutage(name string) error {
	switch c.Outage {
	case "", OutageShare, OutageError, OutageOpen, OutageClosed:
		return nil
	}
	return invalid("%s is %.40q; accepted: share, error, open or closed", name, string(c.Outage))
}

// A Limiter is a [quota.Limiter] that [New] made, and the state of its parts. Its methods may be called concurrently; the
// caller must close it, which closes its store.
type Limiter struct {
	*quota.Limiter
}

// Health asks the servers of the store for their software, version and evictions, see backend.Health. Give ctx a deadline.
func (l *Limiter) Health(ctx context.Context) (driver.Health, error) {
	return backend.Health(ctx, l.Store())
}

// Breakers returns the state of the circuit breaker of each node of the store: "closed", "open" or "half-open", see
// resilience.BreakerStates. It is nil for a store in memory, which has none.
func (l *Limiter) Breakers() map[string]string { return resilience.BreakerStates(l.Store()) }

// New returns the limiter that a configuration describes. It sends no request: it makes a limiter also while Redis is down,
// and the limiter works once Redis is up.
//
// Around the store are the policies of [resilience.Standard], a timeout, a bulkhead and a circuit breaker, and the policy that
// decides in an outage, see Config.Outage. Around a store in the memory of this process, which cannot fail, there are none.
//
// A configuration that is not accepted is [quota.ErrInvalid], and the error names the field. Otherwise New fails where
// backend.Open does. A Config.Store is closed where New fails.
func New(ctx context.Context, c Config) (*Limiter, error) {
	limiter, err := open(ctx, &c)
	if err != nil {
		if c.Store != nil {
			c.Store.Close()
		}
		return nil, err
	}
	return &Limiter{limiter}, nil
}

// open makes the limiter. Where it fails, c.Store is the store to close.
func open(ctx context.Context, c *Config) (*quota.Limiter, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	if c.Limit == nil {
		c.Limit = quota.Must(algorithm.ParseLimit("tokens: 1000 burst 10/s bucket"))
	}
	if c.Store == nil {
		url, name := c.URL, "Config.URL"
		if url == "" {
			url = "memory://"
		} else if url == c.variable.url {
			name = c.variable.name
		}
		var err error
		if c.Store, err = backend.Open(ctx, url); err != nil {
			return nil, fmt.Errorf("fleetquota: %s: %w", name, err)
		}
	}
	store := c.Store
	if _, ok := store.(*local.Store); !ok {
		var err error
		if store, err = c.guard(store); err != nil {
			return nil, err
		}
		c.Store = store
	}
	return quota.NewLimiter(store, c.Limit, &quota.Options{LimitFor: c.LimitFor, Observers: c.Observers, MaxWaiters: c.MaxWaiters, Notice: c.warn})
}

// guard puts policies around a store that fleet processes share.
func (c *Config) guard(store quota.Store) (quota.Store, error) {
	outage := c.Outage
	if outage == "" && c.Fleet > 0 {
		outage = OutageShare
	}
	var policy resilience.Policy
	switch outage {
	case OutageShare:
		told, err := c.checkShare()
		if err != nil {
			return nil, err
		}
		notice := c.warn
		if told {
			notice = func(n quota.Notice) {
				if n.Name != "share" || !strings.HasPrefix(n.Text, "limit "+c.Limit.Name()+" ") {
					c.warn(n)
				}
			}
		}
		here := quota.Must(local.NewWithOptions(local.Options{MaxKeys: max(c.FallbackKeys, local.DefaultMaxKeys)}))
		policy = resilience.Fallback(here, resilience.Instances(c.Fleet), &resilience.FallbackOptions{MaxKeys: c.FallbackKeys, Notice: notice})
	case OutageOpen:
		policy = resilience.FailOpen(&resilience.FailOptions{Notice: c.warn})
	case OutageClosed:
		policy = resilience.FailClosed(&resilience.FailOptions{Notice: c.warn})
	default:
		policy = resilience.FailWithError()
	}
	timeout := c.Timeout
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	return resilience.Standard(store, policy, &resilience.StandardOptions{Timeout: timeout, InFlight: c.InFlight, Breaker: c.Breaker, Notice: c.warn})
}

// checkShare fails where the limit has no share, and warns where the share is 0.
func (c *Config) checkShare() (told bool, err error) {
	s, ok := c.Limit.Algorithm().(driver.Sharer)
	if !ok {
		return false, nil
	}
	share, err := s.Share(c.Fleet)
	if err != nil {
		return false, fmt.Errorf("fleetquota: FLEET_SIZE is %d: %w", c.Fleet, err)
	}
	if most := c.Limit.Capacity(); most > 0 && most < math.MaxInt64 && share.Spec().Capacity == 0 {
		c.warn(quota.Notice{Name: "share", Text: fmt.Sprintf("FLEET_SIZE is %d and limit %q has a capacity of %d, which is less than one token for each process: "+
			"while the store cannot decide, this process denies", c.Fleet, c.Limit, most)})
		told = true
	}
	return told, nil
}

// warn logs a notice.
func (c *Config) warn(n quota.Notice) { quotalog.Notices(c.Logger)(n) }
