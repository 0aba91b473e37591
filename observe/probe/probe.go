// Package probe tells an orchestrator, such as Kubernetes, whether a process can decide about quota: by handlers for
// readiness and liveness.
//
//	probes, err := probe.New(limiter.Store(), nil)
//	if err != nil {
//		return err
//	}
//	http.Handle("GET /readyz", probes.Ready())
//	http.Handle("GET /livez", probes.Live())
//
// # States
//
// A check asks the servers for their health, see backend.Health, and peeks at some keys of its own through the store and all
// of its policies. It charges nothing.
//
//	state          ready  live  the store
//	ok             200    200   decides
//	degraded       200    200   cannot be asked in part or at all, and a policy decides in its place: a fallback, or one that admits
//	unavailable    503    200   cannot be asked, and the callers get errors, or denials by a policy that cannot ask
//	misconfigured  503    200   is set up wrongly, also where a policy decides in its place: a right, a password, a server that
//	                            computes wrongly
//	closed         503    503   was closed by this process
//
// No denial by a limit makes a state. A process is ready while a single node of several is down, for the keys on the others.
// A restart cures no state but closed, so that the others leave a process alive. A server that refuses no more than the
// questions for its health, such as one without the right +info, is ok.
//
// # Answers
//
// The body is JSON: the state, the error if there is one, and the server's software, version and evictions where they are
// known. It names servers, and no key or credential.
//
// A check takes at most [Options.Timeout], and serves all requests within [Options.MaxAge], so that a flood of them does not
// reach the store.
//
// # Concurrency
//
// All functions and methods may be called concurrently.
package probe

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Defaults of [Options].
const (
	DefaultTimeout = 800 * time.Millisecond // less than the second after which Kubernetes gives a probe up
	DefaultMaxAge  = time.Second
)

// Options are the options of New. The zero value, and nil, take the defaults.
type Options struct {
	// Timeout is the longest time of a check; 0 is DefaultTimeout. It should be above the timeout of the store's policies,
	// or an outage is found by this one.
	Timeout time.Duration
	// MaxAge is how long a result serves; 0 is DefaultMaxAge.
	MaxAge time.Duration
}

// State is the state of a store.
type State string

// The states, see the package documentation.
const (
	OK            State = "ok"
	Degraded      State = "degraded"
	Unavailable   State = "unavailable"
	Misconfigured State = "misconfigured"
	Closed        State = "closed"
)

// Ready reports whether a process with such a store should get requests.
func (s State) Ready() bool { return s == OK || s == Degraded }

// A Result is the outcome of a check.
type Result struct {
	State  State
	Err    error         // the cause, or nil
	Health driver.Health // the zero Health where the servers did not tell
}

// A Probe checks a store. [New] makes one.
type Probe struct {
	store quota.Store
	o     Options

	mu     sync.Mutex
	latest *check
}

// check is a check that is under way, or over. result and ended are set before done is closed.
type check struct {
	done   chan struct{}
	result Result
	ended  time.Time
}

// New returns a probe of a store with its policies, such as limiter.Store(). A nil store, or an option that is not accepted,
// is [quota.ErrInvalid].
func New(store quota.Store, o *Options) (*Probe, error) {
	p := &Probe{store: store}
	if o != nil {
		p.o = *o
	}
	switch {
	case store == nil:
		return nil, invalid("the store is nil; accepted: a store, such as limiter.Store()")
	case p.o.Timeout < 0:
		return nil, invalid("Options.Timeout is %v; accepted: 0 or more", p.o.Timeout)
	case p.o.MaxAge < 0:
		return nil, invalid("Options.MaxAge is %v; accepted: 0 or more", p.o.MaxAge)
	}
	if p.o.Timeout == 0 {
		p.o.Timeout = DefaultTimeout
	}
	if p.o.MaxAge == 0 {
		p.o.MaxAge = DefaultMaxAge
	}
	return p, nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("probe: %w: "+format, append([]any{quota.ErrInvalid}, args...)...)
}

// Check returns the state of the store: of the latest check if that is young enough, else of a new one. It returns within
// the timeout also where the store does not, and when the context ends, with the state Unavailable.
func (p *Probe) Check(ctx context.Context) Result {
	p.mu.Lock()
	c := p.latest
	if c == nil || c.old(p.o.MaxAge) {
		c = &check{done: make(chan struct{})}
		p.latest = c
		go p.run(c)
	}
	p.mu.Unlock()
	timer := time.NewTimer(p.o.Timeout + p.o.Timeout/8) // a store that honours deadlines tells more
	defer timer.Stop()
	select {
	case <-c.done:
		return c.result
	case <-timer.C:
		return Result{State: Unavailable, Err: fmt.Errorf("probe: the store did not answer within %v", p.o.Timeout)}
	case <-ctx.Done():
		return Result{State: Unavailable, Err: ctx.Err()}
	}
}

// old reports whether a check is over for longer than age.
func (c *check) old(age time.Duration) bool {
	select {
	case <-c.done:
		return time.Since(c.ended) >= age
	default:
		return false
	}
}

// keys is how many keys are peeked at: so many that the masters of a small cluster have one each, most likely.
const keys = 8

// limit is the limit of the keys, by a rule that all stores have.
var limit = quota.NewLimit("fleetquota-probe", algorithm.TokenBucket(1, 1, time.Second))

// run makes a check.
func (p *Probe) run(c *check) {
	ctx, cancel := context.WithTimeout(context.Background(), p.o.Timeout)
	defer cancel()
	var wg sync.WaitGroup
	var health driver.Health
	asked := errPanicked
	var sources [keys]quota.Source
	var errs [keys]error
	guarded := func(do func()) {
		wg.Go(func() {
			defer func() { _ = recover() }() // errPanicked tells
			do()
		})
	}
	guarded(func() { health, asked = backend.Health(ctx, p.store) })
	for i := range keys {
		errs[i] = errPanicked
		guarded(func() {
			d, err := p.store.Charge(ctx, quota.Charge{Limit: limit, Key: "fleetquota-probe-" + strconv.Itoa(i), Op: quota.OpPeek})
			sources[i], errs[i] = d.Source, err
		})
	}
	wg.Wait()
	c.result = judge(asked, sources[:], errs[:])
	c.result.Health = health
	c.ended = time.Now()
	close(c.done)
}

var errPanicked = fmt.Errorf("probe: %w: the store panicked", quota.ErrIndeterminate)

// judge returns the state that the answer for the health and the answers to the peeks show.
func judge(health error, sources []quota.Source, errs []error) Result {
	if errors.Is(health, errors.ErrUnsupported) {
		health = nil
	}
	var failed, wrong error
	decided, byStore := 0, 0
	for i, err := range errs {
		switch {
		case err == nil && sources[i] == quota.FromClosed:
		case err == nil:
			decided++
			if s := sources[i]; s == quota.FromStore || s == quota.FromLease || s == quota.FromMemory {
				byStore++
			}
		case errors.Is(err, quota.ErrClosed):
			return Result{State: Closed, Err: err}
		case errors.Is(err, quota.ErrMisconfigured):
			wrong = err
		default:
			failed = err
		}
	}
	if failed == nil {
		failed = health
	}
	switch {
	case wrong != nil:
		return Result{State: Misconfigured, Err: wrong}
	case byStore == 0 && errors.Is(health, quota.ErrMisconfigured):
		return Result{State: Misconfigured, Err: health}
	case byStore == len(errs) && (health == nil || errors.Is(health, quota.ErrMisconfigured)):
		return Result{State: OK, Err: health}
	case decided > 0:
		return Result{State: Degraded, Err: failed}
	}
	return Result{State: Unavailable, Err: failed}
}

// Ready returns the handler for readiness: 200 where the state is ready, else 503.
func (p *Probe) Ready() http.Handler { return p.handler(State.Ready) }

// Live returns the handler for liveness: 200 unless the store was closed, else 503.
func (p *Probe) Live() http.Handler { return p.handler(func(s State) bool { return s != Closed }) }

func (p *Probe) handler(good func(State) bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Cache-Control", "no-store")
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			h.Set("Allow", "GET, HEAD")
			http.Error(w, "accepted: GET and HEAD", http.StatusMethodNotAllowed)
			return
		}
		result := p.Check(r.Context())
		body := answer{State: result.State, Kind: result.Health.Kind, Version: result.Health.Version, Eviction: result.Health.Eviction, Evicted: result.Health.Evicted}
		if result.Err != nil {
			body.Error = result.Err.Error()
		}
		h.Set("Content-Type", "application/json")
		status := http.StatusOK
		if !good(result.State) {
			status = http.StatusServiceUnavailable
		}
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(body)
	})
}

// answer is the body of an answer.
type answer struct {
	State    State  `json:"state"`
	Error    string `json:"error,omitempty"`
	Kind     string `json:"kind,omitempty"`
	Version  string `json:"version,omitempty"`
	Eviction string `json:"eviction,omitempty"`
	Evicted  int64  `json:"evicted,omitempty"`
}
