package goredis

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/backend/internal/redisurl"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// A client of a cluster asks one node after the other for the slots, and waits at a node that hangs. So a store made
// from a URL answers its client's question itself: it asks all nodes at once, and takes the first good answer. The
// questions have connections and a time of their own, and no caller's context.

// surveyor asks the nodes of a cluster for the slots. Methods may be called concurrently.
type surveyor struct {
	config   *redisurl.Config
	survey   engine.Survey[[]redis.ClusterSlot]
	question engine.Topology // shared by all calls that come while it is under way
	covered  *atomic.Pointer[covered]

	// mu guards the fields below. Once closed, no client is made.
	mu      sync.Mutex
	closed  bool
	slots   []redis.ClusterSlot
	clients map[string]*redis.Client // by address: of the URL's nodes, and of those of the last answer
}

// newSurveyor returns a surveyor that notes which slots have a node.
func newSurveyor(c *redisurl.Config, covered *atomic.Pointer[covered]) *surveyor {
	s := &surveyor{config: c, covered: covered, clients: map[string]*redis.Client{}}
	s.question.Ask = s.ask
	return s
}

// Slots is ClusterOptions.ClusterSlots.
func (s *surveyor) Slots(ctx context.Context) ([]redis.ClusterSlot, error) {
	if err := s.question.Refresh(ctx); err != nil {
		if err == ctx.Err() {
			err = fmt.Errorf("redis: %w: nothing was sent: %w", quota.ErrUnavailable, err)
		}
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.slots, nil
}

// ask asks the nodes.
func (s *surveyor) ask() error {
	addrs := s.nodes()
	slots, err := s.survey.Ask(addrs, func(addr string) ([]redis.ClusterSlot, error) {
		client := s.client(addr)
		if client == nil {
			return nil, redis.ErrClosed
		}
		answer, err := client.Do(context.Background(), "CLUSTER", "SLOTS").Slice()
		if err != nil {
			return nil, err
		}
		return readSlots(answer, addr)
	})
	if err != nil {
		var answer redis.Error
		if driver.Sentinel(err) == nil {
			err = engine.ConnectError(err, errors.As(err, &answer))
		}
		return err
	}
	s.covered.Store(coveredBy(slots))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slots = slots
	named := s.addrs()
	for addr, client := range s.clients {
		if !slices.Contains(named, addr) {
			delete(s.clients, addr)
			go client.Close() // it may be waiting for an answer
		}
	}
	return nil
}

// nodes returns the addresses of the nodes to ask.
func (s *surveyor) nodes() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.addrs()
}

// addrs returns the addresses of the URL and of the last answer. The caller holds s.mu.
func (s *surveyor) addrs() []string {
	addrs := slices.Clone(s.config.Addrs)
	for _, r := range s.slots {
		for _, n := range r.Nodes {
			if addr := dialled(n.Addr); !slices.Contains(addrs, addr) {
				addrs = append(addrs, addr)
			}
		}
	}
	return addrs
}

// client returns the client for questions to a node, or nil once s is closed.
func (s *surveyor) client(addr string) *redis.Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	client := s.clients[addr]
	if client == nil && !s.closed {
		o := clientOptions(s.config)
		o.Addr, o.PoolSize, o.ConnMaxIdleTime = addr, 1, time.Minute
		client = redis.NewClient(o)
		s.clients[addr] = client
	}
	return client
}

// close ends all questions.
func (s *surveyor) close() {
	s.question.Close()
	s.mu.Lock()
	s.closed = true
	for _, client := range s.clients {
		client.Close()
	}
	s.mu.Unlock()
	s.question.Wait()
}

var errSlots = errors.New("the answer to CLUSTER SLOTS names no slots, or is of another form")

// readSlots reads an answer to CLUSTER SLOTS of the node at an address.
func readSlots(answer []any, from string) (slots []redis.ClusterSlot, err error) {
	for _, r := range answer {
		fields, _ := r.([]any)
		if len(fields) < 3 {
			return nil, errSlots
		}
		first, ok := fields[0].(int64)
		last, ok2 := fields[1].(int64)
		if !ok || !ok2 || first < 0 || first > last || last >= engine.Slots {
			return nil, errSlots
		}
		s := redis.ClusterSlot{Start: int(first), End: int(last)}
		for i, f := range fields[2:] {
			node, _ := f.([]any)
			if len(node) < 2 {
				return nil, errSlots
			}
			port, ok := node[1].(int64)
			host, text := node[0].(string)
			if !ok || !text && node[0] != nil {
				return nil, errSlots
			}
			addr := address(host, port, from)
			if addr == "" && i == 0 { // the master
				break
			}
			if addr != "" {
				s.Nodes = append(s.Nodes, redis.ClusterNode{Addr: addr})
			}
		}
		if len(s.Nodes) > 0 {
			slots = append(slots, s)
		}
	}
	if len(slots) == 0 {
		return nil, errSlots
	}
	return slots, nil
}

// address returns the address of a node in an answer of the node at another address, by the client's own rules: a node
// that does not know its own host says none, "?" stands for a host that is not known, a loopback host of another
// machine's is that machine, and a port of 0 is the one that was asked. A loopback host is marked, see dialled.
func address(host string, port int64, from string) string {
	fromHost, fromPort, _ := net.SplitHostPort(from)
	switch {
	case host == "?":
		return ""
	case host == "", loopback(host) && !local(fromHost):
		host = fromHost
	}
	if loopback(host) {
		host += mark
	}
	text := strconv.FormatInt(port, 10)
	if port == 0 {
		text = fromPort
	}
	return net.JoinHostPort(host, text)
}

func loopback(host string) bool { ip := net.ParseIP(host); return ip != nil && ip.IsLoopback() }

// local reports whether a host is this machine, as the client sees it.
func local(host string) bool {
	host = strings.ToLower(host)
	return loopback(host) || host == "localhost" || strings.HasSuffix(host, ".docker.internal")
}

// mark follows a loopback host in the answer that the client gets: it takes the host of an address away that it sees as
// loopback, for it does not know which node answered.
const mark = "%"

// dialled returns an address of the answer as it is dialled.
func dialled(addr string) string { return strings.Replace(addr, mark, "", 1) }

// newNode is ClusterOptions.NewClient.
func newNode(o *redis.Options) *redis.Client {
	o.Addr = dialled(o.Addr)
	if o.NodeAddress != "" {
		o.NodeAddress = dialled(o.NodeAddress)
	}
	return redis.NewClient(o)
}

// covered is the slots that have a node.
type covered [engine.Slots]bool

func coveredBy(slots []redis.ClusterSlot) *covered {
	c := &covered{}
	for _, s := range slots {
		for i := max(s.Start, 0); i <= s.End && i < engine.Slots; i++ {
			c[i] = len(s.Nodes) > 0
		}
	}
	return c
}
