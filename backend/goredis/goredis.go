// Package goredis keeps limits in Redis through a go-redis client: a single server, Sentinel, or a Redis
// Cluster.
//
//	client := redis.NewClient(&redis.Options{Addr: "localhost:6379", ContextTimeoutEnabled: true})
//	store, err := goredis.New(client, nil)
//	limiter, err := quota.NewLimiter(store, limit, nil)
//	decision, err := limiter.Take(ctx, "203.0.113.9", 1)
//
// A decision is one EVALSHA (at first one EVAL), made with the server's time. A denial and a peek write nothing.
//
// While four scripts to a server, or to a slot of a cluster, are in flight, further charges and lists wait.
// When the first of the four ends, all that wait go together in one script, each decided by itself and in
// order. The context bounds the wait: a caller whose context ends before the script is sent is not charged;
// if it ends later, the outcome is unknown. An error that several callers got from one script has a method
// RoundTrip, which tells policies so.
//
// On a cluster few keys share a slot, and with it a script. So while four scripts to a node are in flight,
// further scripts to the node wait, and are then written together as a pipeline of the node's client; hooks
// that OnNewNode adds see the pipeline. Each script is sent once all the same.
//
// The store connects before it decides, in one attempt for each node that all calls share and that goes on when a
// caller leaves. A call that leaves meanwhile fails with [quota.ErrUnavailable]: it was not sent. A connection is found
// by reading the value of a charge's key.
//
// # Keys and hash slots
//
// THE FIRST SEGMENT OF A KEY IS THE HASH TAG. All keys with the same first segment live in one hash slot, and
// so on one node of a cluster. That is of use where a list has several keys: it is decided in one step if
// they share the segment. But with keys such as "ip/203.0.113.9" and "user/42" all the addresses, or all the
// users, of a service are in ONE slot, on one node, which then carries the whole load. Put the identifier
// first, as in "203.0.113.9/ip" and "42/user", or use a single segment.
//
// # At most once
//
// The store uses the client as it is. The client's own retries, which would charge again after a lost reply,
// do not apply to the store's calls. Redirections of a cluster are followed, and a lost connection makes a
// cluster client look for the new master at once. If the outcome of a call is unknown, it fails with
// [quota.ErrIndeterminate]; a charge with an ID may then be repeated.
//
// # Clusters
//
// A ClusterClient asks the server for COMMAND, to learn where commands go. The user must have a right to
// COMMAND, or ClusterOptions.DisableRoutingPolicies must be set; otherwise each refusal costs a round trip a
// decision.
//
// # Deadlines
//
// While go-redis waits for a reply, it obeys a context's deadline only with ContextTimeoutEnabled, and
// cancellation never. Without the option the client's ReadTimeout bounds a call.
package goredis

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Options are the options of New. The zero value, and nil, have the defaults.
type Options struct {
	// Prefix begins every key; "" stands for "quota:". At most 64 printable ASCII characters, no space, no
	// brace.
	Prefix string
	// Strict refuses a list of charges whose groups lie in different hash slots with quota.ErrCrossSlot, on a
	// single server too, so that development behaves as production does. Otherwise a single server decides
	// any list in one step, and a cluster decides such a list slot by slot; see Store.
	Strict bool
	// NoBatching sends every decision in a script of its own, and every script to a node of a cluster by
	// itself. Otherwise charges and scripts share round trips under load, see the package documentation: more
	// decisions a second, and no wait without load.
	NoBatching bool
	// Notice receives the notices for operators, see [quota.Notice]; nil drops them. It may be called
	// concurrently.
	Notice func(quota.Notice)
	// Clock replaces the server's time, for tests; nil stands for the server's time.
	Clock func() time.Time
}

// Store is a quota.Store in Redis. Methods may be called concurrently.
//
// On a cluster a list of charges whose groups lie in different slots is taken slot by slot, in parallel; if
// one slot denies, the charges that the others granted are given back. Such decisions are marked Split. They
// never admit too much. A denied list may hold tokens for a round trip. If tokens could not be given back, for
// at most a second and within the context, the list fails with quota.ErrIndeterminate; they come back by refill.
type Store struct {
	engine *engine.Store
}

var (
	_ quota.Store           = (*Store)(nil)
	_ driver.Graded         = (*Store)(nil)
	_ driver.HealthReporter = (*Store)(nil)
	_ driver.Placed         = (*Store)(nil)
	_ driver.Reporter       = (*Store)(nil)
)

// Take decides one charge.
func (s *Store) Take(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	return s.engine.Take(ctx, c)
}

// TakeAll decides a list of charges and writes a decision for each to out. A cluster may decide it slot by
// slot, see Store.
func (s *Store) TakeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	return s.engine.TakeAll(ctx, cs, out)
}

// Atomicity says which lists are decided in one step: on a cluster, and with Options.Strict, those of one
// group.
func (s *Store) Atomicity() driver.Atomicity { return s.engine.Atomicity() }

// Health asks the server, or each master of a cluster, for its INFO, and gives Options.Notice notice of
// dangers to quotas: "eviction" if the policy of eviction is not noeviction, "evicted" if keys were evicted
// since the last call, "version" if a server is too old. It fails as a decision does, and with quota.ErrMisconfigured
// if a server computes something else than the scripts need.
func (s *Store) Health(ctx context.Context) (driver.Health, error) { return s.engine.Health(ctx) }

// Node returns the address of the node of a cluster that would decide a charge, or "" where the store does not know
// the node yet. On a single server it is always "". See [driver.Placed].
func (s *Store) Node(c quota.Charge) string { return s.engine.Node(c) }

// Refresh asks a cluster anew which node has which keys, and returns when that is known or the context ends. On a
// single server it does nothing.
func (s *Store) Refresh(ctx context.Context) error { return s.engine.Refresh(ctx) }

// Report has the store report the time of round trips to its nodes, and its notices if Options.Notice is nil. See
// [driver.Reporter].
func (s *Store) Report(r driver.Reports) { s.engine.Report(r) }

// Close closes the store, and the client if the store was made from a URL. Waiting and later calls fail with
// quota.ErrClosed. Close returns when no batch is in flight.
func (s *Store) Close() error { return s.engine.Close() }

// New returns a store over a client, which the caller must close. It sends nothing. The client must be a
// *redis.Client (a single server or Sentinel) or a *redis.ClusterClient. New fails with quota.ErrInvalid for
// other clients: a Ring would spread one quota over servers that do not know of each other, and a wrapper may
// retry.
func New(client redis.UniversalClient, o *Options) (*Store, error) {
	if o == nil {
		o = &Options{}
	}
	a := newAdapter()
	cluster, heedsDeadline := false, false
	switch c := client.(type) {
	case *redis.Client:
		if c == nil {
			return nil, refused("a nil *redis.Client")
		}
		heedsDeadline = c.Options().ContextTimeoutEnabled
		a.single.Store(c)
	case *redis.ClusterClient:
		if c == nil {
			return nil, refused("a nil *redis.ClusterClient")
		}
		if c.Options().MaxRedirects < 1 { // the client changes -1 to 0, and 0 to 3
			return nil, fmt.Errorf("goredis: %w: MaxRedirects is -1; accepted: 0, which is 3, or more, or no redirection would be followed", quota.ErrInvalid)
		}
		heedsDeadline = c.Options().ContextTimeoutEnabled
		a.cluster, cluster = c, true
		if !o.NoBatching {
			a.pipelines = newPipelines()
		}
	default:
		return nil, refused(fmt.Sprintf("a %T", client))
	}
	if !heedsDeadline && o.Notice != nil {
		o.Notice(quota.Notice{Name: "deadline", Text: "ContextTimeoutEnabled is off: calls are bounded by the client's ReadTimeout, not by their context"})
	}
	s, err := engine.New(a, cluster, engine.Options(*o))
	if err != nil {
		return nil, err
	}
	return &Store{engine: s}, nil
}

func refused(what string) error {
	return fmt.Errorf("goredis: %w: the client is %s; accepted: a *redis.Client or a *redis.ClusterClient", quota.ErrInvalid, what)
}

// adapter is an engine.Client over a go-redis client.
type adapter struct {
	cluster   *redis.ClusterClient         // nil for a single server
	single    atomic.Pointer[redis.Client] // nil for a cluster
	pipelines *pipelines                   // nil on a single server, and without batching
	owned     bool                         // Close closes the client
	nodes     nodes                        // of a cluster

	// repair leaves a demoted primary. On a cluster a replica answers MOVED instead.
	repair  engine.Repair
	refused atomic.Pointer[string] // the key of the last call that a replica refused
	// renew makes a client of a single server, and longest bounds its calls; nil unless the store has a URL.
	renew   func() *redis.Client
	longest time.Duration

	// mu guards closed. Once it is set, single does not change, and no client joins the retired ones.
	mu      sync.Mutex
	closed  bool
	life    chan struct{}  // closed by Close
	retired sync.WaitGroup // clients that were replaced, until they are closed
}

// once is a command that the client must not retry.
type once struct{ *redis.Cmd }

func (once) NoRetry() bool { return true }

// Do sends a script, on a cluster through the pipelines.
func (a *adapter) Do(ctx context.Context, args []any, _ int) (engine.Reply, error) {
	send := a.alone
	if a.pipelines != nil {
		send = a.piped
	}
	cmd, err := send(ctx, args)
	if err != nil {
		return nil, err
	}
	r, ok := cmd.Val().([]any)
	if !ok {
		return reply(nil), nil
	}
	return reply(r), nil
}

// alone sends a script by itself.
func (a *adapter) alone(ctx context.Context, args []any) (*redis.Cmd, error) {
	cmd := redis.NewCmd(ctx, args...)
	single := a.single.Load()
	var err error
	if single == nil {
		err = a.cluster.Process(ctx, once{cmd})
	} else {
		err = single.Process(ctx, once{cmd})
	}
	if err == nil || err == redis.Nil { // a null is a reply of the wrong shape
		return cmd, nil
	}
	var answer redis.Error
	if single != nil && errors.As(err, &answer) && engine.IsDemoted(answer) && single == a.single.Load() {
		key := args[3].(string)
		a.refused.Store(&key)
		a.repair.Soon()
	}
	return nil, a.classify(ctx, err)
}

// classify returns an error of the client as one of package quota.
func (a *adapter) classify(ctx context.Context, err error) error {
	var answer redis.Error
	if _, unknown := errors.AsType[unknownMaster](err); unknown {
		return fmt.Errorf("redis: %w: %w", quota.ErrMisconfigured, err)
	}
	switch {
	case errors.As(err, &answer):
		if engine.IsNoScript(err) {
			return err
		}
		return engine.ReplyError(answer) // the text of the reply, without the words around it
	case errors.Is(err, redis.ErrPoolTimeout), errors.Is(err, redis.ErrPoolExhausted):
		return fmt.Errorf("redis: %w: %w", quota.ErrOverloaded, err)
	case errors.Is(err, redis.ErrClosed):
		return fmt.Errorf("redis: %w: %w", quota.ErrClosed, err)
	}
	if a.cluster != nil {
		// Without retries the client would not look for the new master. It does so in the background, and
		// limits how often.
		a.cluster.ReloadState(ctx)
	}
	if end, set := ctx.Deadline(); set && errors.Is(err, os.ErrDeadlineExceeded) && !time.Now().Before(end) {
		err = fmt.Errorf("%w: %w", context.DeadlineExceeded, err) // the client does not tell it from its own timeouts
	}
	return engine.TransportError(err)
}

// Info returns the INFO of the server, or of each master.
func (a *adapter) Info(ctx context.Context) ([]string, error) {
	var mu sync.Mutex
	var infos []string
	ask := func(ctx context.Context, c *redis.Client) error {
		info, err := c.Info(ctx).Result()
		mu.Lock()
		defer mu.Unlock()
		infos = append(infos, info)
		return err
	}
	var err error
	if a.cluster != nil {
		err = a.cluster.ForEachMaster(ctx, ask)
	} else {
		err = ask(ctx, a.single.Load())
	}
	if err != nil {
		return nil, a.classify(ctx, err)
	}
	return infos, nil
}

// Close ends the pipelines, and closes the client if it is owned.
func (a *adapter) Close() error {
	a.nodes.topology.Close()
	a.repair.Close()
	if a.pipelines != nil {
		a.pipelines.close()
		defer a.pipelines.wait()
	}
	if !a.owned {
		return nil
	}
	if a.cluster != nil {
		defer a.nodes.topology.Wait()
		return a.cluster.Close()
	}
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	close(a.life)
	a.retired.Wait()
	return a.single.Load().Close()
}

// reply is an engine.Reply over a reply as go-redis decodes it.
type reply []any

func (r reply) Len() int { return len(r) }

func (r reply) Int(i int) (int64, bool) {
	if i >= len(r) {
		return 0, false
	}
	n, ok := r[i].(int64)
	return n, ok
}

func (r reply) Text(i int) (string, bool) {
	if i >= len(r) {
		return "", false
	}
	if r[i] == nil {
		return "", true
	}
	s, ok := r[i].(string)
	return s, ok
}
