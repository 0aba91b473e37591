package engine

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// surveyTimeout bounds the wait for the first good answer of a Survey.
const surveyTimeout = 2 * time.Second

// Survey asks nodes for one answer. A node that hangs delays no survey: all are asked at once, and the first good answer
// is taken. A node that has not answered an earlier question is asked no other. The zero Survey is ready for use.
// Methods may be called concurrently.
type Survey[T any] struct {
	mu    sync.Mutex
	asked map[string]bool // the nodes that have not answered
}

// Ask asks the nodes, each in a goroutine of its own. It returns the error of ask if no answer is good, and
// ErrUnavailable if no node answers or none could be asked.
func (s *Survey[T]) Ask(nodes []string, ask func(node string) (T, error)) (T, error) {
	answers, failures := make(chan T, len(nodes)), make(chan error, len(nodes))
	asked := 0
	for _, node := range nodes {
		if !s.begin(node) {
			continue
		}
		asked++
		go func() {
			var answer T
			err := Catch("the client", true, func() (err error) {
				defer s.end(node) // before the answer is taken, for the next survey asks the node again
				answer, err = ask(node)
				return err
			})
			if err != nil {
				failures <- err
			} else {
				answers <- answer
			}
		}()
	}
	timeout := time.NewTimer(surveyTimeout)
	defer timeout.Stop()
	err := fmt.Errorf("redis: %w: %w", quota.ErrUnavailable, errNotAsked)
	var none T
	for range asked {
		select {
		case answer := <-answers:
			return answer, nil
		case err = <-failures:
		case <-timeout.C:
			return none, fmt.Errorf("redis: %w: no node told the slots within %v", quota.ErrUnavailable, surveyTimeout)
		}
	}
	return none, err
}

var errNotAsked = errors.New("no node was asked: an earlier question is without an answer")

// begin reports whether a node may be asked.
func (s *Survey[T]) begin(node string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.asked[node] {
		return false
	}
	if s.asked == nil {
		s.asked = map[string]bool{}
	}
	s.asked[node] = true
	return true
}

func (s *Survey[T]) end(node string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.asked, node)
}
