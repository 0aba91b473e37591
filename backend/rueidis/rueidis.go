// Package rueidis keeps limits in Redis through a rueidis client: a Redis Cluster, a single server, or
// Sentinel. Concurrent calls share connections and travel together.
//
//	client, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{"localhost:6379"}})
//	store, err := fleetrueidis.New(client, nil) // import fleetrueidis ".../backend/rueidis"
//	limiter, err := quota.NewLimiter(store, limit, nil)
//
// A decision is one EVALSHA, made with the server's time. A denial and a peek write nothing.
//
// While four scripts to a server, or to a slot of a cluster, are under way, further charges and lists wait for the
// first of them and go together in the next, each decided by itself and in order. A caller's context bounds
// that wait: who leaves before the send is not charged, after it the outcome is unknown. Errors that several
// callers got from one call have a method RoundTrip, which tells policies so.
//
// # At most once
//
// rueidis does not retry scripts, with one exception that cannot be seen in a client that is handed in:
// leave ClientOption.ConnLifetime at 0, or a connection that expires during a stall sends its scripts
// again. Where the outcome of a call is unknown it fails with [quota.ErrIndeterminate]; a charge with an
// ID may then be repeated.
//
// # Clusters
//
// Set ClusterOption.MaxMovedRedirections, to 3 for example: by default a redirection that cannot be followed
// is followed for ever, or until the context ends.
//
// A MaxFlushDelay of 20 µs, which stores made from a URL set, has calls to a node written together: keys of a
// cluster rarely share a slot, and so a script. On one server, where they share scripts, it gains nothing.
//
// # Deadlines
//
// Many callers share a connection: set AlwaysPipelining, or one caller's deadline closes the connection
// under the others, whose calls are then indeterminate, and keep ConnWriteTimeout short.
package rueidis

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/redis/rueidis"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Options change what New makes. The zero value, and nil, take the defaults.
type Options struct {
	// Prefix begins every key; "" is "quota:". Up to 64 printable ASCII characters, no space, no brace.
	Prefix string
	// Strict refuses lists of charges whose groups lie in different hash slots with quota.ErrCrossSlot,
	// on a single server too, so that development behaves as production does. Otherwise a single server
	// decides any list in one step, and a cluster decides such a list slot by slot; see Store.
	Strict bool
	// NoBatching sends every decision in a script of its own. Otherwise charges that come while four
	// scripts to their server, or to their slot of a cluster, are under way wait for the first of them, and go
	// together in the next: more decisions a second under load, and no wait without.
	NoBatching bool
	// Notice is told what an operator should know, see [quota.Notice]; nil is nobody.
	Notice func(quota.Notice)
	// Clock replaces the server's time, for tests; nil is the server's time.
	Clock func() time.Time
}

// Store is a quota.Store in Redis. It is safe for concurrent use.
//
// On a cluster a list of charges whose groups lie in different slots is taken slot by slot, in parallel;
// where one denies, what the others granted is given back. Such decisions are marked Split. They never
// admit too much; a denied list may hold tokens for one round trip, and tokens whose return was lost
// come back by refill.
type Store struct {
	engine *engine.Store
}

var (
	_ quota.Store           = (*Store)(nil)
	_ driver.Graded         = (*Store)(nil)
	_ driver.HealthReporter = (*Store)(nil)
)

// Take decides one charge.
func (s *Store) Take(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	return s.engine.Take(ctx, c)
}

// TakeAll decides a list of charges; on a cluster, slot by slot where it must, see Store.
func (s *Store) TakeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	return s.engine.TakeAll(ctx, cs, out)
}

// Atomicity says how far lists are decided in one step: on a cluster, and with Options.Strict, within one group.
func (s *Store) Atomicity() driver.Atomicity { return s.engine.Atomicity() }

// Health asks the server, or each master of a cluster, for its INFO, and tells Options.Notice of dangers to quotas:
// "eviction" of a policy other than noeviction, "evicted" of keys evicted since the last call, "version" of a
// server that is too old. It fails as a decision does.
func (s *Store) Health(ctx context.Context) (driver.Health, error) { return s.engine.Health(ctx) }

// Close ends the store: calls in flight end, later ones are quota.ErrClosed. It closes the client only where the
// store was made from a URL.
func (s *Store) Close() error { return s.engine.Close() }

// New returns a store over a client, which stays the caller's to close. It sends nothing.
func New(client rueidis.Client, o *Options) (*Store, error) {
	if o == nil {
		o = &Options{}
	}
	if client == nil {
		return nil, fmt.Errorf("rueidis: %w: the client is nil; accepted: a rueidis.Client", quota.ErrInvalid)
	}
	a := &adapter{client: client}
	s, err := engine.New(a, client.Mode() == rueidis.ClientModeCluster, engine.Options(*o))
	if err != nil {
		return nil, err
	}
	return &Store{engine: s}, nil
}

// adapter is an engine.Client.
type adapter struct {
	client rueidis.Client
	owned  bool // Close closes the client
}

func (a *adapter) Do(ctx context.Context, args []any, keys int) (_ engine.Reply, err error) {
	// rueidis panics where it finds keys of different slots in a command. The engine sends none; should
	// a key of its own making ever fool it, that is an error and no way to stop a process.
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("redis: %w: the client panicked: %v", quota.ErrMisconfigured, r)
		}
	}()
	b := a.client.B()
	var cmd rueidis.Completed
	if args[0].(string) == "evalsha" {
		c := b.Evalsha().Sha1(args[1].(string)).Numkeys(int64(keys)).Key(args[3].(string))
		for _, k := range args[4 : 3+keys] {
			c = c.Key(k.(string))
		}
		if len(args) == 3+keys {
			cmd = c.Build()
		} else {
			d := c.Arg(args[3+keys].(string))
			for _, arg := range args[4+keys:] {
				d = d.Arg(arg.(string))
			}
			cmd = d.Build()
		}
	} else {
		list := make([]string, 0, len(args))
		for _, arg := range args[3:] {
			list = append(list, arg.(string))
		}
		cmd = b.Eval().Script(args[1].(string)).Numkeys(int64(keys)).Key(list[:keys]...).Arg(list[keys:]...).Build()
	}
	result := a.client.Do(ctx, cmd)
	if err := result.Error(); err != nil {
		return nil, classify(err)
	}
	r, err := result.ToArray()
	if err != nil {
		return reply(nil), nil
	}
	return reply(r), nil
}

func classify(err error) error {
	if _, ok := rueidis.IsRedisErr(err); ok || rueidis.IsRedisNil(err) { // a null is a reply too
		if engine.IsNoScript(err) {
			return err
		}
		return engine.ReplyError(err)
	}
	if errors.Is(err, rueidis.ErrNoSlot) { // no node to send to
		return fmt.Errorf("redis: %w: %w", quota.ErrUnavailable, err)
	}
	return engine.TransportError(err)
}

func (a *adapter) Info(ctx context.Context) ([]string, error) {
	var infos []string
	for _, node := range a.client.Nodes() {
		info, err := node.Do(ctx, node.B().Info().Build()).ToString()
		if err != nil {
			return nil, classify(err)
		}
		infos = append(infos, info)
	}
	return infos, nil
}

func (a *adapter) Close() error {
	if a.owned {
		a.client.Close()
	}
	return nil
}

// reply is an engine.Reply.
type reply []rueidis.RedisMessage

func (r reply) Len() int { return len(r) }

func (r reply) Int(i int) (int64, bool) {
	if i >= len(r) || !r[i].IsInt64() {
		return 0, false
	}
	n, err := r[i].ToInt64()
	return n, err == nil
}

func (r reply) Text(i int) (string, bool) {
	if i >= len(r) {
		return "", false
	}
	if r[i].IsNil() {
		return "", true
	}
	if !r[i].IsString() { // ToString makes texts of other kinds too
		return "", false
	}
	s, err := r[i].ToString()
	return s, err == nil
}
