package redisserver

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Cluster is a Redis Cluster of three masters with a replica each. A node that is silent for a second is
// taken for down.
type Cluster struct {
	// Nodes are all nodes; the first three began as masters, and node i+3 as the replica of node i.
	Nodes []*Node
}

// Node is a server of a Cluster.
type Node struct {
	*Server
	// ID is the node's id in the cluster. It stays the same over Restart.
	ID string
}

const masters = 3

// StartCluster starts a Cluster whose nodes have further arguments of redis-server, and ends it with the
// test.
func StartCluster(tb testing.TB, args ...string) *Cluster {
	tb.Helper()
	return start(tb, func(dir string) (*Cluster, error) { return LaunchCluster(dir, args...) })
}

// LaunchCluster starts a Cluster that keeps its files in the directory dir, and waits until it is complete.
// The caller must Stop it. It takes a little more than two seconds: a master does not serve earlier after its
// start.
func LaunchCluster(dir string, args ...string) (_ *Cluster, err error) {
	c := &Cluster{Nodes: make([]*Node, 2*masters)}
	defer func() {
		if err != nil {
			c.Stop()
		}
	}()
	args = slices.Concat([]string{"--user", admin, "on", ">" + admin, "~*", "&*", "+@all", "--cluster-enabled", "yes",
		"--cluster-config-file", "nodes.conf", "--cluster-node-timeout", "1000"}, args)
	err = parallel(len(c.Nodes), func(i int) error {
		n := &Node{Server: &Server{dir: filepath.Join(dir, fmt.Sprint("node-", i)), auth: true, bus: -1}}
		if err := os.MkdirAll(n.dir, 0o700); err != nil {
			return err
		}
		if err := n.launch(nil, args); err != nil {
			return err
		}
		c.Nodes[i] = n
		id, err := n.Do("CLUSTER", "MYID")
		if err != nil {
			return err
		}
		n.ID = id.(string)
		// Different epochs from the start spare the nodes to settle which of them is whose.
		if _, err = n.Do("CLUSTER", "SET-CONFIG-EPOCH", strconv.Itoa(i+1)); err == nil && i < masters {
			err = n.AddSlots(i*slots/masters, (i+1)*slots/masters)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	// Each pair meets directly, which is faster than waiting for gossip.
	err = parallel(len(c.Nodes), func(i int) error {
		n := c.Nodes[i]
		for _, other := range c.Nodes[i+1:] {
			if _, err := n.Do("CLUSTER", "MEET", loopback, strconv.Itoa(other.port), strconv.Itoa(other.bus)); err != nil {
				return err
			}
		}
		if i < masters {
			return nil
		}
		return waitFor("a replica to know its master", func() error {
			m := c.Nodes[i-masters]
			_, err := n.Do("CLUSTER", "REPLICATE", m.ID)
			if err != nil { // a meeting that takes a second, on a loaded machine, is forgotten: meet again
				_, _ = n.Do("CLUSTER", "MEET", loopback, strconv.Itoa(m.port), strconv.Itoa(m.bus))
			}
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	if err := c.WaitOK(); err != nil {
		return nil, err
	}
	return c, nil
}

// AddSlots makes a node of a cluster the owner of the slots from the first one to before the end.
func (s *Server) AddSlots(first, end int) error {
	command := []string{"CLUSTER", "ADDSLOTS"} // the command for ranges came with 7.0
	for slot := first; slot < end; slot++ {
		command = append(command, strconv.Itoa(slot))
	}
	_, err := s.Do(command...)
	return err
}

// Stop ends all nodes.
func (c *Cluster) Stop() {
	for _, n := range c.Nodes {
		if n != nil {
			n.Server.Stop()
		}
	}
}

// Addrs returns the addresses of all nodes.
func (c *Cluster) Addrs() []string {
	var out []string
	for _, n := range c.Nodes {
		out = append(out, n.Addr())
	}
	return out
}

// node returns the node with an id, or nil.
func (c *Cluster) node(id string) *Node {
	for _, n := range c.Nodes {
		if n.ID == id {
			return n
		}
	}
	return nil
}

// nodeView is a line of CLUSTER NODES: the view that a node has of a node.
type nodeView struct {
	id, master string
	flags      []string
	epoch      int64
	slots      []string // ranges, such as 0-5460
}

func (v nodeView) has(flags ...string) bool {
	return slices.ContainsFunc(flags, func(f string) bool { return slices.Contains(v.flags, f) })
}

func (v nodeView) owns(slot int) bool {
	for _, r := range v.slots {
		low, high, ok := strings.Cut(r, "-")
		if !ok {
			high = low
		}
		from, _ := strconv.Atoi(low)
		if to, _ := strconv.Atoi(high); from <= slot && slot <= to {
			return true
		}
	}
	return false
}

func (n *Node) view() ([]nodeView, error) {
	v, err := n.do(time.Second, "CLUSTER", "NODES")
	if err != nil {
		return nil, err
	}
	var out []nodeView
	for line := range strings.Lines(v.(string)) {
		f := strings.Fields(line)
		if len(f) < 8 {
			return nil, fmt.Errorf("redisserver: CLUSTER NODES says %q", line)
		}
		o := nodeView{id: f[0], flags: strings.Split(f[2], ","), master: f[3]}
		o.epoch, _ = strconv.ParseInt(f[6], 10, 64)
		for _, s := range f[8:] {
			if !strings.HasPrefix(s, "[") { // a slot on its way
				o.slots = append(o.slots, s)
			}
		}
		out = append(out, o)
	}
	return out, nil
}

// self returns the view that a node has of itself.
func (n *Node) self() (nodeView, error) {
	list, err := n.view()
	if err != nil {
		return nodeView{}, err
	}
	for _, v := range list {
		if v.has("myself") {
			return v, nil
		}
	}
	return nodeView{}, errors.New("redisserver: a node does not know itself")
}

// MasterFor returns the running node that serves a key.
func (c *Cluster) MasterFor(key string) (*Node, error) { return c.MasterForSlot(Slot(key)) }

// MasterForSlot returns the running node that serves a slot: of those that claim it, the one with the newest
// claim.
func (c *Cluster) MasterForSlot(slot int) (*Node, error) {
	var best *Node
	var epoch int64 = -1
	for _, n := range c.Nodes {
		if !n.Running() {
			continue
		}
		v, err := n.self()
		if err != nil {
			return nil, err
		}
		if v.has("master") && v.owns(slot) && v.epoch > epoch {
			best, epoch = n, v.epoch
		}
	}
	if best == nil {
		return nil, fmt.Errorf("redisserver: no running node serves slot %d", slot)
	}
	return best, nil
}

// Replicas returns the running nodes that replicate a node.
func (c *Cluster) Replicas(of *Node) ([]*Node, error) {
	var out []*Node
	for _, n := range c.Nodes {
		if !n.Running() {
			continue
		}
		v, err := n.self()
		if err != nil {
			return nil, err
		}
		if v.master == of.ID {
			out = append(out, n)
		}
	}
	return out, nil
}

// Failover has a replica take over from its master without loss, as an operator does, and waits until that is
// settled. It returns the new master. Given a master, it chooses a replica of it.
func (c *Cluster) Failover(n *Node) (*Node, error) {
	v, err := n.self()
	if err != nil {
		return nil, err
	}
	if v.has("master") {
		replicas, err := c.Replicas(n)
		if err != nil {
			return nil, err
		}
		if len(replicas) == 0 {
			return nil, errors.New("redisserver: the master has no running replica")
		}
		n = replicas[0]
	}
	if _, err := n.Do("CLUSTER", "FAILOVER"); err != nil {
		return nil, err
	}
	err = waitFor("the failover", func() error {
		if v, err := n.self(); err != nil || v.has("master") {
			return err
		}
		return errors.New("the replica is still a replica")
	})
	if err != nil {
		return nil, n.withLog(err)
	}
	return n, c.WaitOK()
}

// BeginMove puts a slot on its way from one master to another and moves no key: from asks clients to go to to
// for keys that it does not have, and scripts over keys of which only some are there get TRYAGAIN. MoveSlot
// completes it.
func (c *Cluster) BeginMove(slot int, from, to *Node) error {
	s := strconv.Itoa(slot)
	if _, err := to.Do("CLUSTER", "SETSLOT", s, "IMPORTING", from.ID); err != nil {
		return err
	}
	_, err := from.Do("CLUSTER", "SETSLOT", s, "MIGRATING", to.ID)
	return err
}

// MoveSlot moves a slot and its keys from one master to another while clients use it, and waits until all
// nodes know.
func (c *Cluster) MoveSlot(slot int, from, to *Node) error {
	if err := c.BeginMove(slot, from, to); err != nil {
		return err
	}
	s := strconv.Itoa(slot)
	err := waitFor("the slot's keys to move", func() error {
		v, err := from.Do("CLUSTER", "GETKEYSINSLOT", s, "100")
		if err != nil {
			return fatal{err}
		}
		keys := v.([]any)
		if len(keys) == 0 {
			return nil
		}
		args := []string{"MIGRATE", loopback, strconv.Itoa(to.port), "", "0", "5000", "AUTH2", admin, admin, "KEYS"}
		for _, k := range keys {
			args = append(args, k.(string))
		}
		if _, err := from.Do(args...); err != nil {
			return err
		}
		return errors.New("there are keys left")
	})
	if err != nil {
		return from.withLog(err)
	}
	// The new owner first: if the old one were first, it would send clients to a node that sends them back.
	order := []*Node{to, from}
	for _, n := range c.Nodes {
		if n == to || n == from || !n.Running() {
			continue
		}
		if v, err := n.self(); err != nil {
			return err
		} else if v.has("master") { // replicas refuse it and learn by gossip
			order = append(order, n)
		}
	}
	for _, n := range order {
		if _, err := n.Do("CLUSTER", "SETSLOT", s, "NODE", to.ID); err != nil {
			return err
		}
	}
	return c.WaitOK()
}

// WaitOK waits until the running nodes say that the cluster is well and agree on the server of each slot,
// running nodes serve all slots, and running replicas have a live link. After a failure of a master it
// returns when the failover is complete.
func (c *Cluster) WaitOK() error {
	if err := waitFor("the cluster", c.settled); err != nil {
		for _, n := range c.Nodes {
			if n.Running() {
				return n.withLog(err)
			}
		}
		return err
	}
	return nil
}

func (c *Cluster) settled() error {
	var agreed string
	for _, n := range c.Nodes {
		if !n.Running() {
			continue
		}
		list, err := n.view()
		if err != nil {
			return err
		}
		var said []string
		for _, v := range list {
			peer := c.node(v.id)
			running := peer != nil && peer.Running()
			if len(v.slots) > 0 && !running {
				return fmt.Errorf("%s: slots %v belong to a node that does not run", n.Addr(), v.slots)
			}
			if !running {
				continue
			}
			if v.has("fail", "fail?", "handshake", "noaddr") {
				return fmt.Errorf("%s: node %s is %v", n.Addr(), peer.Addr(), v.flags)
			}
			// A master that takes a slot before it knows all epochs may claim it with one that is taken: some
			// nodes would never believe it. A replica shows the epoch of its master, late.
			epoch := v.epoch
			if !v.has("master") {
				epoch = 0
			}
			said = append(said, fmt.Sprint(peer.Addr(), " of ", v.master, " in ", epoch, ": ", v.slots))
		}
		slices.Sort(said)
		switch view := strings.Join(said, "\n"); {
		case agreed == "":
			agreed = view
		case agreed != view:
			return fmt.Errorf("nodes differ:\n%s\n%s", agreed, view)
		}
		v, err := n.do(time.Second, "CLUSTER", "INFO")
		if err != nil {
			return err
		}
		if m := fields(v.(string)); m["cluster_state"] != "ok" || m["cluster_slots_ok"] != strconv.Itoa(slots) {
			return fmt.Errorf("%s: state %s, %s slots", n.Addr(), m["cluster_state"], m["cluster_slots_ok"])
		}
		m, err := n.info(time.Second, "replication")
		if err != nil {
			return err
		}
		if m["role"] == "slave" && m["master_link_status"] != "up" {
			return fmt.Errorf("%s: link to its master is %s", n.Addr(), m["master_link_status"])
		}
	}
	if want := c.running(); strings.Count(agreed, "\n")+1 != want {
		return fmt.Errorf("only these of %d nodes know each other:\n%s", want, agreed)
	}
	return nil
}

func (c *Cluster) running() (n int) {
	for _, node := range c.Nodes {
		if node.Running() {
			n++
		}
	}
	return n
}
