package rueidis

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/redis/rueidis"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
)

// nodes says which node of a cluster has a slot, and sends scripts there. The client has such a table too, but shows it
// to no caller, and learns it anew up to a second after a fault.
type nodes struct {
	table    atomic.Pointer[table] // nil until the first answer
	topology engine.Topology
	survey   engine.Survey[*table]
}

// table does not change once it is made.
type table struct {
	of    [engine.Slots]uint16 // an index in nodes
	nodes []node               // the first stands for no node
}

type node struct {
	addr   string
	client rueidis.Client // nil if the client has no such node yet
}

func newAdapter(client rueidis.Client) *adapter {
	a := &adapter{client: client, cluster: client.Mode() == rueidis.ClientModeCluster}
	a.nodes.topology.Ask = a.askTopology
	a.repair.Do = a.leave
	a.demoted = func(key string) {
		a.refused.Store(&key)
		a.repair.Soon()
	}
	return a
}

// at returns the node that has a slot. Both its fields are zero if that is not known.
func (a *adapter) at(slot uint16) node {
	if !a.cluster {
		return node{}
	}
	t := a.nodes.table.Load()
	if t == nil {
		a.nodes.topology.Soon()
		return node{}
	}
	return t.nodes[t.of[slot]]
}

// Node returns the address of the master that has a slot.
func (a *adapter) Node(slot uint16) string { return a.at(slot).addr }

// Refresh asks the cluster for its slots.
func (a *adapter) Refresh(ctx context.Context) error {
	if !a.cluster {
		return nil
	}
	return a.nodes.topology.Refresh(ctx)
}

// send sends a script to the node that has its first key, or else by the client, which finds the node.
func (a *adapter) send(ctx context.Context, args []any, keys int) rueidis.RedisResult {
	if !a.cluster {
		return a.client.Do(ctx, a.command(args, keys))
	}
	n := a.at(engine.SlotOf(args[3].(string)))
	if n.client == nil {
		a.nodes.topology.Soon()
		if n.addr != "" {
			return a.client.Do(ctx, a.toAnyNode(args, keys))
		}
		return a.client.Do(ctx, a.command(args, keys))
	}
	result := n.client.Do(ctx, a.command(args, keys))
	err := result.Error()
	if err == nil {
		return result
	}
	answer, is := rueidis.IsRedisErr(err)
	if !is {
		a.nodes.topology.Soon()
		return result
	}
	_, moved := answer.IsMoved()
	if _, ask := answer.IsAsk(); !moved && !ask {
		return result
	}
	// Nothing ran. The client follows the redirection.
	a.nodes.topology.Soon()
	return a.client.Do(ctx, a.command(args, keys))
}

// toAnyNode returns a script that the client sends to any node, for it has no keys that the client sees. A node redirects
// it to the one that has them, which is new to the client: the client's own table still names the one before,
// which may answer nothing, and only a redirection has the client learn it anew.
func (a *adapter) toAnyNode(args []any, keys int) rueidis.Completed {
	list := make([]string, 0, len(args))
	for i, arg := range args[1:] {
		if i == 1 {
			list = append(list, strconv.Itoa(keys))
			continue
		}
		list = append(list, arg.(string))
	}
	return a.client.B().Arbitrary(args[0].(string)).Args(list...).Build()
}

// askTopology asks all nodes at once for the slots, and takes the first good answer.
func (a *adapter) askTopology() error {
	known := a.client.Nodes()
	t, err := a.nodes.survey.Ask(slices.Collect(maps.Keys(known)), func(addr string) (*table, error) {
		// Without a deadline: if the question has to dial, other calls wait for the same connection, and would get
		// the end of its context.
		client := known[addr]
		answer, err := client.Do(context.Background(), client.B().ClusterSlots().Build()).ToArray()
		if err != nil {
			return nil, err
		}
		return newTable(answer, addr, known)
	})
	if err == nil {
		a.nodes.table.Store(t)
		return nil
	}
	if _, is := rueidis.IsRedisErr(err); is {
		return engine.ReplyError(err)
	}
	if errors.Is(err, quota.ErrUnavailable) {
		return err
	}
	if errors.Is(err, rueidis.ErrClosing) {
		return a.closing(context.Background(), err, true)
	}
	return fmt.Errorf("redis: %w: no node told the slots: %w", quota.ErrUnavailable, err)
}

// newTable reads an answer to CLUSTER SLOTS of the node at an address.
func newTable(answer []rueidis.RedisMessage, from string, known map[string]rueidis.Client) (*table, error) {
	t := &table{nodes: []node{{}}}
	indexes := map[string]uint16{}
	for _, r := range answer {
		fields, err := r.ToArray()
		if err != nil || len(fields) < 3 {
			return nil, errSlots
		}
		first, err := fields[0].AsInt64()
		last, err2 := fields[1].AsInt64()
		if err != nil || err2 != nil || first < 0 || first > last || last >= engine.Slots {
			return nil, errSlots
		}
		addr, err := address(fields[2], from)
		if err != nil {
			return nil, err
		}
		if addr == "" { // a node whose address is not known
			continue
		}
		i, ok := indexes[addr]
		if !ok {
			i = uint16(len(t.nodes))
			indexes[addr] = i
			t.nodes = append(t.nodes, node{addr, known[addr]})
		}
		for slot := first; slot <= last; slot++ {
			t.of[slot] = i
		}
	}
	if len(t.nodes) == 1 {
		return nil, errSlots
	}
	return t, nil
}

var errSlots = errors.New("the answer to CLUSTER SLOTS names no slots, or is of another form")

// address returns the address of a node in an answer of the node at another address, as the client writes it: a node that
// does not know its own host says none, and "?" stands for a host that is not known.
func address(m rueidis.RedisMessage, from string) (string, error) {
	fields, err := m.ToArray()
	if err != nil || len(fields) < 2 {
		return "", errSlots
	}
	port, err := fields[1].AsInt64()
	if err != nil {
		return "", errSlots
	}
	host := ""
	if !fields[0].IsNil() {
		if host, err = fields[0].ToString(); err != nil {
			return "", errSlots
		}
	}
	switch host {
	case "?":
		return "", nil
	case "":
		if host, _, err = net.SplitHostPort(from); err != nil {
			host = strings.Trim(from, "[]")
		}
	}
	return net.JoinHostPort(host, strconv.FormatInt(port, 10)), nil
}

// Node returns the address of the master that has a slot, once the client is made.
func (l *lazy) Node(slot uint16) string {
	if a := l.made.Load(); a != nil {
		return a.Node(slot)
	}
	return ""
}

// Refresh asks the cluster for its slots, once the client is made.
func (l *lazy) Refresh(ctx context.Context) error {
	if a := l.made.Load(); a != nil {
		return a.Refresh(ctx)
	}
	return nil // the next call makes the client
}

const (
	// warmReads is how many reads go to a node for all of its connections to be made. A read takes any connection;
	// the most that a client has to a node without an option of the caller's are four.
	warmReads = 32
	// warmRepeats is how often a read is repeated whose connection broke.
	warmRepeats = 8
)

// Warm has the client make its connections to a node.
func (a *adapter) Warm(ctx context.Context, name, key string) error {
	if a.cluster && name == "" {
		return a.nodes.topology.Refresh(ctx)
	}
	client := a.named(name, key)
	if client == nil {
		return nil
	}
	shakes := a.shakes.Load()
	err := engine.ConnectAll(warmReads, func() error { return a.connect(ctx, client, key) })
	switch {
	case err != nil:
		a.nodes.topology.Soon()
	case shakes == a.shakes.Load():
		a.steady.Store(true)
	}
	return err
}

// Ping makes a round trip to a node.
func (a *adapter) Ping(ctx context.Context, name, key string) error {
	if client := a.named(name, key); client != nil {
		return a.connect(ctx, client, key)
	}
	return nil
}

// Ping makes a round trip to a node, once the client is made.
func (l *lazy) Ping(ctx context.Context, name, key string) error {
	if a := l.made.Load(); a != nil {
		return a.Ping(ctx, name, key)
	}
	return errNoClient
}

// named returns the client of the node of a name, which has a key. It is nil if the key's slot is another node's by now, or
// the client knows no such node: then its Do finds one.
func (a *adapter) named(name, key string) rueidis.Client {
	if !a.cluster {
		return a.client
	}
	if n := a.at(engine.SlotOf(key)); n.addr == name {
		return n.client
	}
	return nil
}

// connect sees to a connection of a client.
func (a *adapter) connect(ctx context.Context, client rueidis.Client, key string) error {
	for repeats := 0; ; repeats++ {
		err := client.Do(ctx, client.B().Arbitrary("GET").Keys(key).Build()).Error()
		if err == nil || rueidis.IsRedisNil(err) {
			return nil
		}
		if ofAnother(ctx, err) && repeats < warmRepeats {
			continue
		}
		if err = a.ofWarming(ctx, err); err == nil || !engine.Broken(err) || repeats == warmRepeats {
			return err
		}
	}
}

// ofWarming classifies an error of a read of Warm's.
func (a *adapter) ofWarming(ctx context.Context, err error) error {
	if _, reply := rueidis.IsRedisErr(err); reply {
		return engine.WarmError(err)
	}
	return a.ofQuestion(ctx, err)
}

var (
	_ engine.Placer  = (*adapter)(nil)
	_ engine.Placer  = (*lazy)(nil)
	_ engine.Warmer  = (*adapter)(nil)
	_ engine.Bundler = (*adapter)(nil)
	_ engine.Scanner = (*adapter)(nil)
)
