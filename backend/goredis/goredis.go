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
// While four scripts to a server, or to a slot, are in flight, further charges and lists wait.
// When the first of the four ends, all that wait go together in one script, each decided by itself and in
// order. The context bounds the wait: a caller whose context ends before the script is sent is not charged;
// if it ends later, the outcome is unknown. An error that several callers got from one script has a method
// RoundTrip, which tells policies so.
//
// On a cluster few keys share a slot, and with it a script; and behind an address that is not known to be one server few
// share a group. So while four scripts to a node are in flight,
// further scripts to the node wait, and are then written together as a pipeline of the node's client; hooks
// that OnNewNode adds see the pipeline. Each script is sent once all the same.
//
// The store connects before it decides, in one attempt for each node that all calls share and that goes on when a
// caller leaves. A call that leaves meanwhile fails with [quota.ErrUnavailable]: it was not sent. A connection is found
// by reading the value of a charge's key.
//
// # One server or several
//
// Charges to different keys share a script only where one server is known to have all keys. An address does not tell:
// behind it there may be a proxy that sends each script to the server of its first key, or a node of a cluster. So the
// store of a client for one server asks, with 16 small scripts that return INFO's run_id: when it has connected, after
// a connection was lost, and with Health. Until it knows, and where the user has no right to INFO or the server has no
// run_id, only charges of one group share a script, and lists over several groups are taken in parts; the notice
// "batching" tells. It costs up to half of the throughput over many keys. BatchAll says that there is one server.
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
// cancellation never. Without the option the client's ReadTimeout bounds a call. With it, and for a store from a URL, a
// timeout policy needs no goroutine for each call: it answers a call that was cancelled when its own time is over, at the
// latest.
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
	// single server too, so that development behaves as production does, and bounds batches to a slot.
	// Otherwise a server that is known to be the only one decides any list in one step, and other lists are
	// decided slot by slot; see Store.
	Strict bool
	// Batching says which charges may share a script; the zero value is BatchAuto.
	Batching Batching
	// Notice receives the notices for operators, see [quota.Notice]; nil drops them. It may be called
	// concurrently.
	Notice func(quota.Notice)
	// Clock replaces the server's time, for tests; nil stands for the server's time.
	Clock func() time.Time
}

// Batching says which charges may share a script under load: more decisions a second, and no wait without load.
// See the package documentation.
type Batching uint8

const (
	// BatchAuto lets all charges share a script while the address of a client for one server is known to lead to
	// one server only. Elsewhere, and on a cluster, only charges of one group, or of one slot, share a script.
	BatchAuto Batching = iota
	// BatchSlot lets charges of one group share a script, and of one slot of a cluster. It asks no server.
	BatchSlot
	// BatchAll lets all charges share a script, and decides every list in one step. Choose it where the user may
	// lack a right to INFO, or the server does not tell, and one server has all keys: behind a proxy over several
	// servers it would admit too much. It is refused for a cluster, and with Strict.
	BatchAll
	// BatchNone sends every decision in a script of its own, and every script to a node of a cluster by itself. Lists are decided as with BatchAuto.
	BatchNone
)

// engine returns the options of the engine.
func (o *Options) engine() engine.Options {
	return engine.Options{Prefix: o.Prefix, Strict: o.Strict, Batching: engine.Batching(o.Batching), Notice: o.Notice, Clock: o.Clock}
}

// Store is a quota.Store in Redis. Methods may be called concurrently.
//
// A list of charges to several groups is decided in one step where one server is known to have all keys. Elsewhere
// it is taken group by group, and on a cluster slot by slot, in parallel; if one part is denied, the charges that the
// others granted are given back. Such decisions are marked Split. They
// never admit too much. A denied list may hold tokens for a round trip. If tokens could not be given back, for
// at most a second and within the context, the list fails with quota.ErrIndeterminate; they come back by refill.
type Store struct {
	engine *engine.Store
	prompt bool
}

var (
	_ quota.Store           = (*Store)(nil)
	_ driver.Graded         = (*Store)(nil)
	_ driver.HealthReporter = (*Store)(nil)
	_ driver.Placed         = (*Store)(nil)
	_ driver.Reporter       = (*Store)(nil)
	_ driver.Lister         = (*Store)(nil)
	_ driver.Prompt         = (*Store)(nil)
	_ driver.Measured       = (*Store)(nil)
)

// Charge decides one charge.
func (s *Store) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	return s.engine.Charge(ctx, c)
}

// ChargeAll decides a list of charges and writes a decision for each to out. A cluster may decide it slot by
// slot, see Store.
func (s *Store) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	return s.engine.ChargeAll(ctx, cs, out)
}

// Atomicity says which lists are always decided in one step: those of one group, and with BatchAll any.
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

// Prompt reports whether every call returns by its context's deadline: of a store from a URL, and of a client with
// ContextTimeoutEnabled. Cancellation alone does not end a call that waits for a reply. See [driver.Prompt].
func (s *Store) Prompt() bool { return s.prompt }

// List returns a page of the keys that the server holds, or the masters of a cluster one after the other, by SCAN: a page
// walks over some of the database's keys, and a whole listing over all of them, those of other programs too. It needs the
// right to SCAN. While slots move from node to node their keys may be missed. After a failover or a restart the listing must begin
// anew: its cursor is quota.ErrInvalid then; without a right to INFO a restart is not noticed, and keys may be missed. Behind
// a proxy over several servers it fails with errors.ErrUnsupported where the store knows, see Batching. See [driver.Lister].
func (s *Store) List(ctx context.Context, l driver.Listing) (driver.Page, error) {
	return s.engine.List(ctx, l)
}

// Report has the store report the time of round trips to its nodes, and its notices if Options.Notice is nil. See
// [driver.Reporter].
func (s *Store) Report(r driver.Reports) { s.engine.Report(r) }

// Readings tells how many scripts decided calls, and the numbers of the last Health. See [driver.Measured].
func (s *Store) Readings(tell func(driver.Reading)) { s.engine.Readings(tell) }

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
		if o.Batching == BatchAuto || o.Batching == BatchSlot {
			a.pipelines = newPipelines()
		}
	case *redis.ClusterClient:
		if c == nil {
			return nil, refused("a nil *redis.ClusterClient")
		}
		if c.Options().MaxRedirects < 1 { // the client changes -1 to 0, and 0 to 3
			return nil, fmt.Errorf("goredis: %w: MaxRedirects is -1; accepted: 0, which is 3, or more, or no redirection would be followed", quota.ErrInvalid)
		}
		heedsDeadline = c.Options().ContextTimeoutEnabled
		a.cluster, cluster = c, true
		if o.Batching != BatchNone {
			a.pipelines = newPipelines()
		}
	default:
		return nil, refused(fmt.Sprintf("a %T", client))
	}
	if !heedsDeadline && o.Notice != nil {
		o.Notice(quota.Notice{Name: "deadline", Text: "ContextTimeoutEnabled is off: calls are bounded by the client's ReadTimeout, not by their context"})
	}
	s, err := engine.New(a, cluster, o.engine())
	if err != nil {
		return nil, err
	}
	a.apart = s.Apart
	return &Store{engine: s, prompt: heedsDeadline}, nil
}

func refused(what string) error {
	return fmt.Errorf("goredis: %w: the client is %s; accepted: a *redis.Client or a *redis.ClusterClient", quota.ErrInvalid, what)
}

// adapter is an engine.Client over a go-redis client.
type adapter struct {
	cluster   *redis.ClusterClient         // nil for a single server
	single    atomic.Pointer[redis.Client] // nil for a cluster
	pipelines *pipelines                   // nil without batching
	apart     func() bool                  // few scripts hold several keys
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

// Do sends a script, through the pipelines where few scripts hold several keys.
func (a *adapter) Do(ctx context.Context, args []any, _ int) (engine.Reply, error) {
	send := a.alone
	if a.pipelines != nil && a.apart() {
		send = a.piped
	}
	cmd, err := send(ctx, args)
	if err != nil {
		return nil, err
	}
	return replyOf(cmd), nil
}

func replyOf(cmd *redis.Cmd) engine.Reply {
	switch r := cmd.Val().(type) {
	case []any:
		return reply(r)
	case string:
		return engine.Bulk(r)
	}
	return reply(nil)
}

// DoAll sends scripts to a single server in one pipeline.
func (a *adapter) DoAll(ctx context.Context, scripts [][]any) ([]engine.Reply, error) {
	conn := a.single.Load().Conn() // see sendPipeline
	defer conn.Close()
	pipe := conn.Pipeline()
	cmds := make([]*redis.Cmd, len(scripts))
	for i, args := range scripts {
		cmds[i] = redis.NewCmd(ctx, args...)
		pipe.Process(ctx, once{cmds[i]})
	}
	pipe.Exec(ctx) // each command has the error of its own
	replies := make([]engine.Reply, len(cmds))
	for i, cmd := range cmds {
		if err := cmd.Err(); err != nil && err != redis.Nil {
			return nil, a.classify(ctx, err)
		}
		replies[i] = replyOf(cmd)
	}
	return replies, nil
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
	if errors.As(err, &answer) {
		a.demotes(single, answer, args[3].(string))
	}
	return nil, a.classify(ctx, err)
}

// demotes looks at an error reply to a script with a key, through the client of a single server: a demoted primary is
// left.
func (a *adapter) demotes(single *redis.Client, answer redis.Error, key string) {
	if single != nil && engine.IsDemoted(answer) && single == a.single.Load() {
		a.refused.Store(&key)
		a.repair.Soon()
	}
}

// classify returns an error of the client as one of package quota.
func (a *adapter) classify(ctx context.Context, err error) error {
	var answer redis.Error
	if _, unknown := errors.AsType[unknownMaster](err); unknown {
		return fmt.Errorf("redis: %w: %w", quota.ErrMisconfigured, err)
	}
	switch {
	case driver.Sentinel(err) != nil: // of a question for the slots
		return err
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
		return engine.Catch("the client", true, func() error { // on a cluster, a goroutine of the client's calls ask
			info, err := c.Info(ctx).Result()
			mu.Lock()
			defer mu.Unlock()
			infos = append(infos, info)
			return err
		})
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

// Scan asks a node for some of its keys. The client may send it again, for it changes nothing.
func (a *adapter) Scan(ctx context.Context, name, key string, scan []string) (got engine.Scanned, err error) {
	node := a.named(ctx, name, key)
	if node == nil {
		return got, engine.ErrNodeGone
	}
	pipe := node.Pipeline()
	info := pipe.Info(ctx, "server")
	args := make([]any, len(scan))
	for i := range scan {
		args[i] = scan[i]
	}
	answer := pipe.Do(ctx, args...)
	pipe.Exec(ctx) // each command has the error of its own
	elements, err := answer.Slice()
	if err != nil {
		return got, a.classify(ctx, err)
	}
	got.Info = info.Val()
	if len(elements) == 2 {
		got.Cursor, _ = elements[0].(string)
		keys, _ := elements[1].([]any)
		for _, k := range keys {
			text, _ := k.(string)
			got.Keys = append(got.Keys, text)
		}
	}
	return got, nil
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
		a.nodes.surveyor.close()
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
