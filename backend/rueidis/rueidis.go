// Package rueidis keeps limits in Redis through a rueidis client: a Redis Cluster, a single server, or
// Sentinel. Concurrent calls share connections and travel together.
//
//	client, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{"localhost:6379"}, AlwaysPipelining: true})
//	store, err := fleetrueidis.New(client, nil) // import fleetrueidis ".../backend/rueidis"
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
// rueidis does not retry scripts, with one exception that the store cannot see in a client:
// ClientOption.ConnLifetime must stay 0, or a connection that expires during a stall sends its scripts again.
// If the outcome of a call is unknown, it fails with [quota.ErrIndeterminate]; a charge with an ID may then
// be repeated.
//
// # Clusters
//
// Set ClusterOption.MaxMovedRedirections, to 3 for example. By default the client follows redirections
// without end, or until the context ends.
//
// With a MaxFlushDelay of 20 µs, which stores made from a URL have, calls to a node are written together:
// keys of a cluster rarely share a slot, and with it a script. On a single server, where they share scripts,
// the delay gains no throughput.
//
// # Deadlines
//
// Many callers share a connection. Set AlwaysPipelining, or one caller's deadline closes the connection under
// the others, whose calls are then indeterminate; and keep ConnWriteTimeout short. Every call of a store from a URL
// returns by its context's deadline, so that a timeout policy needs no goroutine for it.
package rueidis

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"

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
	// BatchNone sends every decision in a script of its own. Lists are decided as with BatchAuto.
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

// Prompt reports whether every call returns by its context's deadline: of a store from a URL. Of another's client it is
// not known when its connections end. See [driver.Prompt].
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

// New returns a store over a client, which the caller must close. It sends nothing. It fails with
// quota.ErrInvalid if the client is nil or Options.Prefix is not accepted.
func New(client rueidis.Client, o *Options) (*Store, error) {
	if o == nil {
		o = &Options{}
	}
	if client == nil {
		return nil, fmt.Errorf("rueidis: %w: the client is nil; accepted: a rueidis.Client", quota.ErrInvalid)
	}
	a := newAdapter(client)
	s, err := engine.New(a, a.cluster, o.engine())
	if err != nil {
		return nil, err
	}
	return &Store{engine: s}, nil
}

// adapter is an engine.Client over a rueidis client.
type adapter struct {
	client  rueidis.Client
	cluster bool
	owned   bool        // Close closes the client
	gone    atomic.Bool // the client was closed by its owner
	retired atomic.Bool // the store closes the client, and has another
	nodes   nodes       // of a cluster

	// demoted is told the key of a call that a replica refused. On a cluster a replica answers MOVED instead.
	demoted func(key string)
	refused atomic.Pointer[string] // the key of the last such call
	pauses  pauses                 // of a caller's client, while its connections are ended
	repair  engine.Repair          // of a caller's client

	steadiness // of a client of the store's own
}

// Do sends a script.
func (a *adapter) Do(ctx context.Context, args []any, keys int) (engine.Reply, error) {
	if a.owned && !a.steady.Load() {
		return a.handOver(ctx, args, keys)
	}
	if !a.owned && !a.cluster {
		if err := a.pauses.enter(ctx); err != nil {
			return nil, err
		}
		defer a.pauses.exit()
	}
	return a.do(ctx, args, keys)
}

func (a *adapter) do(ctx context.Context, args []any, keys int) (engine.Reply, error) {
	gone := a.gone.Load()
	call := &call{waiting: waiting{Context: ctx}}
	result := a.sendAgain(&call.waiting, args, keys)
	if result.NonRedisError() != nil {
		a.shake()
	}
	if err := result.Error(); err != nil && !rueidis.IsRedisNil(err) { // a null is a reply of the wrong shape
		if answer, is := rueidis.IsRedisErr(err); is && !a.cluster && engine.IsDemoted(answer) {
			a.demoted(args[3].(string))
		}
		switch {
		case errors.Is(err, rueidis.ErrClosing):
			return nil, a.closing(ctx, err, gone || !call.began.Load())
		case ofAnother(ctx, err):
			return nil, fmt.Errorf("redis: %w: nothing was sent: no connection: %w", quota.ErrUnavailable, err)
		}
		return nil, classify(err)
	}
	if gone { // it was another connection that was closed
		a.gone.Store(false)
	}
	m, _ := result.ToMessage()
	if m.IsString() {
		text, _ := m.ToString()
		call.bulk = engine.Bulk(text)
		return &call.bulk, nil
	}
	call.reply, _ = m.ToArray() // nil if it is none
	return &call.reply, nil
}

// call is a call's context and reply, in one piece of memory.
type call struct {
	waiting
	reply reply
	bulk  engine.Bulk
}

const (
	// tries is how often a call is made whose connection other callers gave up, each time for less than shortTry. An
	// attempt at connecting that lasted longer ran out of its own time.
	tries    = 8
	shortTry = time.Second
)

// sendAgain sends a script, and again if another caller's end kept it from being sent.
func (a *adapter) sendAgain(wait *waiting, args []any, keys int) (result rueidis.RedisResult) {
	for range tries {
		began := time.Now()
		result = a.send(wait, args, keys)
		if !ofAnother(wait.Context, result.NonRedisError()) || time.Since(began) > shortTry {
			break
		}
	}
	return result
}

// ofAnother reports whether an error is the end of another caller's context: that caller was connecting, and the client
// gives its end to all calls that wait for the connection. Nothing of theirs was sent: a command that was written gets
// the error of its connection, or of its own context.
func ofAnother(ctx context.Context, err error) bool {
	if end, set := ctx.Deadline(); err == nil || ctx.Err() != nil || set && !time.Now().Before(end) {
		return false
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
	}
	return err == context.Canceled || err == context.DeadlineExceeded
}

// waiting is the context of a call. It tells whether the client asked for the context's end: it does so when it connects,
// and when it waits for a reply or for room to write, but not when it refuses a call because a connection is closed.
type waiting struct {
	context.Context
	began atomic.Bool
}

func (w *waiting) Done() <-chan struct{} {
	w.began.Store(true)
	return w.Context.Done()
}

func (w *waiting) Deadline() (time.Time, bool) {
	w.began.Store(true)
	return w.Context.Deadline()
}

// closing returns the error of a call that met a closed connection. The client gives ErrClosing to the calls that come
// later, and to those whose replies do not arrive within a second. unsent says that this call was certainly not sent: it
// began when the client was known to be closed, or did not wait. A client also closes connections by itself: to a node
// that left the cluster, to a former master, and of a client that was replaced.
func (a *adapter) closing(ctx context.Context, err error, unsent bool) error {
	if !a.closedByOwner(ctx) {
		if unsent {
			return fmt.Errorf("redis: %w: nothing was sent: the connection was closed: %w", quota.ErrUnavailable, err)
		}
		return fmt.Errorf("redis: %w: the connection was closed: %w", quota.ErrIndeterminate, err)
	}
	a.gone.Store(true)
	if unsent {
		return fmt.Errorf("redis: the client is %w: %w", quota.ErrClosed, err)
	}
	return fmt.Errorf("redis: the client is %w, and this call may have been sent before: %w: %w", quota.ErrClosed, quota.ErrIndeterminate, err)
}

// closedByOwner reports whether the client is closed, when one of its connections is.
func (a *adapter) closedByOwner(ctx context.Context) bool {
	if a.gone.Load() || a.client.Mode() == rueidis.ClientModeStandalone {
		return !a.retired.Load()
	}
	first := a.looksClosed(ctx)
	return first && a.looksClosed(ctx) // the nodes may change between look and question
}

// looksClosed reports whether the connections to the client's present nodes are closed: none but the owner closes them.
func (a *adapter) looksClosed(ctx context.Context) bool {
	nodes := a.client.Nodes()
	answers := make(chan error, len(nodes))
	for _, n := range nodes {
		go func() {
			answers <- engine.Catch("the client", true, func() error { return n.Do(ctx, n.B().Ping().Build()).NonRedisError() })
		}()
	}
	for range nodes {
		switch err := <-answers; {
		case err == nil:
			return false
		case errors.Is(err, rueidis.ErrClosing):
			return true
		}
	}
	return false
}

// DoAll sends scripts to a single server in one pipeline.
func (a *adapter) DoAll(ctx context.Context, scripts [][]any) ([]engine.Reply, error) {
	commands := make([]rueidis.Completed, len(scripts))
	for i, args := range scripts {
		commands[i] = a.command(args, 1)
	}
	replies := make([]engine.Reply, len(scripts))
	for i, result := range a.client.DoMulti(ctx, commands...) {
		if err := result.Error(); err != nil && !rueidis.IsRedisNil(err) {
			return nil, a.ofQuestion(ctx, err)
		}
		r, _ := result.ToArray()
		replies[i] = reply(r)
	}
	return replies, nil
}

// command returns the command of a script. The client uses its memory again, so each attempt needs its own.
func (a *adapter) command(args []any, keys int) rueidis.Completed {
	b := a.client.B()
	if args[0].(string) == "evalsha" {
		c := b.Evalsha().Sha1(args[1].(string)).Numkeys(int64(keys)).Key(args[3].(string))
		for _, k := range args[4 : 3+keys] {
			c = c.Key(k.(string))
		}
		if len(args) == 3+keys {
			return c.Build()
		}
		d := c.Arg(args[3+keys].(string))
		for _, arg := range args[4+keys:] {
			d = d.Arg(arg.(string))
		}
		return d.Build()
	}
	list := make([]string, 0, len(args))
	for _, arg := range args[3:] {
		list = append(list, arg.(string))
	}
	return b.Eval().Script(args[1].(string)).Numkeys(int64(keys)).Key(list[:keys]...).Arg(list[keys:]...).Build()
}

// ofQuestion classifies an error of a command that charges nothing.
func (a *adapter) ofQuestion(ctx context.Context, err error) error {
	if errors.Is(err, rueidis.ErrClosing) {
		return a.closing(ctx, err, true)
	}
	return classify(err)
}

// classify returns an error of the client as one of package quota.
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

// Info returns the INFO of the server, or of each node.
func (a *adapter) Info(ctx context.Context) ([]string, error) {
	var infos []string
	for _, node := range a.client.Nodes() {
		info, err := node.Do(ctx, node.B().Info().Build()).ToString()
		if err != nil {
			return nil, a.ofQuestion(ctx, err)
		}
		infos = append(infos, info)
	}
	return infos, nil
}

// Scan asks a node for some of its keys.
func (a *adapter) Scan(ctx context.Context, name, key string, scan []string) (got engine.Scanned, err error) {
	node := a.named(name, key)
	if node == nil && ctx.Err() == nil { // new to the client, which a redirection has learn of it, see toAnyNode
		a.client.Do(ctx, a.client.B().Arbitrary("GET").Args(key).Build())
		if err := a.Refresh(ctx); err != nil {
			return got, err
		}
		node = a.named(name, key)
	}
	if node == nil {
		return got, engine.ErrNodeGone
	}
	answers := node.DoMulti(ctx, node.B().Info().Section("server").Build(), node.B().Arbitrary(scan[0]).Args(scan[1:]...).Build())
	entry, err := answers[1].AsScanEntry()
	if err != nil {
		return got, a.ofQuestion(ctx, err)
	}
	got.Info, _ = answers[0].ToString() // a refusal is none
	got.Cursor, got.Keys = strconv.FormatUint(entry.Cursor, 10), entry.Elements
	return got, nil
}

// Close closes the client if it is owned.
func (a *adapter) Close() error {
	a.nodes.topology.Close()
	a.repair.Close()
	if a.owned {
		a.client.Close()
		a.nodes.topology.Wait()
		a.handed.Wait()
	}
	return nil
}

// reply is an engine.Reply over a reply as rueidis decodes it.
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
	if !r[i].IsString() { // ToString accepts other kinds too
		return "", false
	}
	s, err := r[i].ToString()
	return s, err == nil
}
